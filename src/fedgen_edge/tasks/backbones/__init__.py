"""How is a pretrained model loaded from a folder, complete and without running its code?"""
