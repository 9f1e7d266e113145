"""From runs to tables and pages: the parts of make_tables.py and make_report.py."""
