"""How does a pretrained model get from a folder into memory, whole and without code of its own?"""
