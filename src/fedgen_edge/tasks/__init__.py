"""What is being learnt?"""
