"""The deletion of finished slices: seven policies, one contract (`base`), one file each."""
