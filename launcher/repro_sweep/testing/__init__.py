"""Conformance suites: what every executor and every searcher must do, for the project's own and for others'.

Subclass a suite in a test module, fill in its one factory method, and let pytest collect the subclass.
"""
