"""What are the results of a run, and what do they mean?"""
