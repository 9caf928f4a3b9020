"""How do diffusion models, GANs and VAEs learn from images?"""
