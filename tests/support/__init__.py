"""What tests share: tiny models, loops, sites and reports."""
