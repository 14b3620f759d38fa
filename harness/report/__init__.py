"""The sign-off document: one HTML file that opens offline, written from stored records only."""
