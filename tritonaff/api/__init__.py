"""The public operations, one file each: function and module together."""
