"What mkdocs calls while it builds: the functions of the chapter about the site."
from nano_dh.site import Site

site = Site()
on_config, on_files = site.on_config, site.on_files
on_page_markdown, on_post_build = site.on_page_markdown, site.on_post_build
