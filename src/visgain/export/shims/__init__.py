"""What runs inside foreign trainers. `shim.py` makes single files of these modules; here they are what tests import."""
