"""How does a method differ from FedAvg?"""
