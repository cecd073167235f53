"""The page that shows runs while they train and after: `danceopd watch`."""
