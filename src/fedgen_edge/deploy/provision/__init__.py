"""What does a folder of a deployment hold, before anything runs?"""
