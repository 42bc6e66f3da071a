import sys

if sys.argv[:1] == ["-m"]:  # `python -m adapt.…`, whose modules are yet to be imported
    from adapt.command import watch

    watch()
