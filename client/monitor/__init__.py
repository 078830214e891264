"""A site's watch over what its model is given: kept from day to day, tested against the model's reference, told in words."""
