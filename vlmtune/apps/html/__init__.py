"""What pages of HTML share: their frame, texts without markup, pictures inside the page."""
