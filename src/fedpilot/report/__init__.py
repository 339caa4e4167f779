"""Pictures and the page of a run, made from its files; the only folder that imports matplotlib and jinja2."""
