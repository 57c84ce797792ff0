"""Where the deletion of finished slices happens: seven policies, one contract (`base`), one file each."""
