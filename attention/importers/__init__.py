"""Profiles that others published, as policy files: one module for each format, listed in `formats.py`.

An importer says in `Imported.approximations` where a policy file cannot say what the foreign file says, and refuses
with `ImportRefused` where there is no faithful meaning. Nothing that is imported has been verified here.
"""
