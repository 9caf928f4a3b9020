"""How does a language model learn from texts, and what are they judged by?"""
