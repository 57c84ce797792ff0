"""Benches measure this machine with the real engine: one file each, and each asserts that it did its work.

`harness/` is what they share, `ends/` are the processes that they start at the ends of a wire. A file here whose
`command` takes options is `mooncache bench NAME`.
"""
