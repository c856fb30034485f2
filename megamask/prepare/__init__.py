"""What several verbs need before their own work: the inputs read and checked once, the rules of a
layout, the dense model.
"""
