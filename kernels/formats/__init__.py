"""Storage formats with their exact sizes in bytes."""
