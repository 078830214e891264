"""The site's own patients: additions, withdrawals, readers' corrections."""
