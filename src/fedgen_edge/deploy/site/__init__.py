"""What do a site's processes do?"""
