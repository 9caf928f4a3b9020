"""How does Flower carry the messages? Nothing else knows it."""
