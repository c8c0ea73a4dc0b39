"""visgain: how much does each answer token of a vision-language dataset need the image?"""

__version__ = "0.1.0"
