"""The methods of the field, a file each, in rooms named after the question they change."""
