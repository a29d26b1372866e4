"""Public data sets -> the records of this project: `python -m data.convert --help`.

formats.py holds one function a layout and kind, readers.py opens files and hub ids, program.py is
the command.
"""
