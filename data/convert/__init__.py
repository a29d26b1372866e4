"""Turn public data sets into the records of this project.

`python -m data.convert --help` lists the layouts that it knows.
readers.py opens files and hub ids, formats.py has one function for each layout and kind of record,
and program.py is the command.
"""
