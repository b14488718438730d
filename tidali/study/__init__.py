"""The rows of the transfer-learning study: trained, measured, and put into one table and page."""
