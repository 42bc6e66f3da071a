"""What every package of the project needs: files, texts, progress, and how a command starts and ends.

Lies below all other packages and imports none of them: the standard library, and `rich` for progress bars.
Importing `common` costs nothing.
"""
