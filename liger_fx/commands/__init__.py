"""The commands of liger-fx, a file each: ``add_parser`` and ``run``; cli.py lists them."""
