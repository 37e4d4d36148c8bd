"""fedsim: what does the server of a federation learn about its clients' data?"""

__version__ = "0.1.0"
