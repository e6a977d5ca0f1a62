"""The documentation's site: the pages of ``docs/``, those that the program itself knows, and the checks of both.

``python -m documentation`` builds it into ``build/site`` (``make docs`` also runs the pages' code). Nothing is fetched:
no font, no script, no style comes from elsewhere.

pages.py      which Markdown files the site is made of, and its navigation
commands.py   the page of every command and option
api.py        the page of the public names
manifest.py   the page of the manifest's fields
blocks.py     the code blocks of a page
links.py      what is wrong with the links of a built site
"""
