"""Faces of other libraries: a script that was written for one of them changes its import."""
