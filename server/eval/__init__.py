"""Evaluation: what operating points cost in answers, against dense attention."""
