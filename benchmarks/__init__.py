"""What the documentation's numbers come from: programs by what they measure, run with `python -m`
from the checkout.
"""
