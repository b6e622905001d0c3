-- What Quarto does with a page beyond Markdown: one listing a function, links, a line under the title.
local stringify = pandoc.utils.stringify

-- nbdev.yml holds the addresses of the site and the repository
local function addresses()
  local res = {}
  local file = io.open(quarto.project.directory .. '/nbdev.yml')
  if not file then return res end
  for line in file:lines() do
    local key, value = line:match('^%s+([%w-]+): "?(.-)"?$')
    if key then res[key] = value end
  end
  file:close()
  return res
end
local address = addresses()

-- The page's path inside the project, and the way back to its top
local function page_path()
  local path = quarto.doc.input_file:sub(#quarto.project.directory + 2)
  local _, depth = path:gsub('/', '')
  return path, ('../'):rep(depth)
end

-- nbdev links its own names by full address: lead to this site's pages instead
local function local_link(link)
  local site = address['site-url']
  if not site then return end
  local _, top = page_path()
  if link.target:sub(1, #site + 1) ~= site .. '/' then return end
  if link.target:match('#_') then return link.content end -- a private name has no place on its page
  link.target = top .. link.target:sub(#site + 2)
  return link
end

-- `nn.Linear`, `F.normalize`, `torch.cdist` lead to PyTorch's pages
local torch = 'https://docs.pytorch.org/docs/stable/'
local modules = {fx = 1, distributions = 1, distributed = 1, export = 1, onnx = 1, optim = 1, amp = 1}
local function torch_link(code)
  local name = code.text:gsub('%(%)$', '')
  local f = name:match('^F%.([%l_%d]+)$')
  local layer = name:match('^nn%.(%u%w*)$')
  local other = name:match('^torch%.([%l_%d]+)$')
  local url
  if f then url = 'generated/torch.nn.functional.' .. f end
  if layer then url = 'generated/torch.nn.' .. layer end
  if other and modules[other] then url = other
  elseif other then url = 'generated/torch.' .. other end
  if url then return pandoc.Link(code, torch .. url .. '.html') end
end

-- An exported cell stands there twice: as nbdev's signature, and as source. Keep a heading and the source.
local function is_source(block)
  local code = block.t == 'Div' and block.content[1]
  return code and code.t == 'CodeBlock' and code.attributes['code-summary'] == 'Exported source'
end

local function entry_at(blocks, i) -- rule, link to the source, heading, signature
  local rule, link, head, sign = blocks[i], blocks[i+1], blocks[i+2], blocks[i+3]
  if not sign or rule.t ~= 'HorizontalRule' or head.t ~= 'Header' or sign.t ~= 'CodeBlock' then return end
  if link.t ~= 'Para' or stringify(link) ~= 'source' then return end
  local last = i + 3
  while blocks[last+1] and (blocks[last+1].t == 'Para' or blocks[last+1].t == 'Table') and last < i + 5 do
    local what = blocks[last+1]
    local text = what.t == 'Para' and what.content[1] and what.content[1].t == 'Emph'
    if not (text or what.t == 'Table') then break end
    last = last + 1
  end
  local name = stringify(head):match('([%w_]+)$')
  return {head = head, link = link, name = name, first = i, last = last}
end

local function pieces(code) -- a cell's source, cut where a function or class begins
  local res, now, name = {}, {}, nil
  local function close()
    if #now > 0 then table.insert(res, {name = name, text = table.concat(now, '\n')}) end
    now, name = {}, nil
  end
  for line in (code.text .. '\n'):gmatch('(.-)\n') do
    local def = line:match('^def ([%w_]+)') or line:match('^class ([%w_]+)')
    local opens = def or line:match('^@')
    if opens and name then close() end
    if def then name = def end
    table.insert(now, line)
  end
  close()
  for _, p in ipairs(res) do p.text = p.text:gsub('%s+$', '') end
  return res
end

local function heading(entry) -- a link to the source, and the name
  local link = entry.link.content[1]
  link.attributes.style = nil
  link.classes = {'source-link'}
  return pandoc.Div({pandoc.Plain({link})}, {class = 'source-line'}), entry.head
end

local function show_source(cell, by_name)
  local code, res = cell.content[1], {}
  local _, lines = code.text:gsub('\n', '')
  local text = '\n' .. code.text
  if lines > 30 and not text:find('\ndef ') and not text:find('\nclass ') then -- styles, scripts
    code.attributes['code-fold'] = 'true'
    return {cell}
  end
  for _, p in ipairs(pieces(code)) do
    local entry = table.remove(by_name[p.name or ''] or {}, 1)
    if entry then for _, b in ipairs({heading(entry)}) do table.insert(res, b) end end
    local source = pandoc.CodeBlock(p.text, {class = 'python cell-code'})
    local by_hand = p.text:match('%(torch%.autograd%.Function%):\n%s+"(.-)"\n')
    if by_hand then -- The formula stands in the code before it
      source.attributes['code-fold'] = 'true'
      source.attributes['code-summary'] = p.name .. ': ' .. by_hand
    end
    table.insert(res, pandoc.Div({source}, {class = 'cell'}))
  end
  for i = 2, #cell.content do table.insert(res, cell.content[i]) end
  return res
end

local function one_listing(blocks)
  local res, i = {}, 1
  while i <= #blocks do
    local by_name, cells, j = {}, {}, i
    while blocks[j] do
      local e = entry_at(blocks, j)
      if e then
        by_name[e.name or ''] = by_name[e.name or ''] or {}
        table.insert(by_name[e.name or ''], e)
        j = e.last + 1
      elseif is_source(blocks[j]) then
        table.insert(cells, blocks[j])
        j = j + 1
      else break end
    end
    for _, cell in ipairs(cells) do
      for _, b in ipairs(show_source(cell, by_name)) do table.insert(res, b) end
    end
    if #cells > 0 then
      i = j
    else
      table.insert(res, blocks[i])
      i = i + 1
    end
  end
  return pandoc.Blocks(res)
end

-- Code that only draws a figure is folded
local function fold_drawing(cell)
  local code, draws = cell.content[1], false
  if not code or code.t ~= 'CodeBlock' or code.attributes['code-fold'] then return end
  cell:walk({Image = function() draws = true end})
  local _, lines = code.text:gsub('\n', '')
  local text = '\n' .. code.text
  local says = text:find('\n%s*assert ') or text:find('\n%s*def ') or text:find('\n%s*class ')
  local plots = code.text:find('plt.', 1, true) or code.text:find('ax.', 1, true)
  if draws and plots and lines > 4 and not says then
    code.attributes['code-fold'] = 'true'
    code.attributes['code-summary'] = 'Code of the figure'
    cell.content[1] = code
    return cell
  end
end

-- A folded cell says what it holds: its first comment, or that it imports
local function name_folded(cell)
  local code, said = cell.content[1], {}
  local folded = code and code.t == 'CodeBlock' and code.attributes['code-fold'] == 'true'
  if not folded or code.attributes['code-summary'] then return end
  for line in code.text:gmatch('[^\n]+') do
    local comment = line:match('^# (.*)')
    if not comment then break end
    table.insert(said, comment)
  end
  if code.text:match('^from ') or code.text:match('^import ') then said = {'Imports'} end
  if #said == 0 then return end
  code.attributes['code-summary'] = table.concat(said, ' ')
  cell.content[1] = code
  return cell
end

-- A full stop or comma stays on the line of the formula before it; a long formula may scroll on a phone
local function keep_together(inlines)
  for i = #inlines, 1, -1 do
    local math, after = inlines[i], inlines[i+1]
    local inline = math.t == 'Math' and math.mathtype == 'InlineMath'
    local long = inline and #math.text > 24
    if long then inlines[i] = pandoc.Span({math}, {class = 'long-math'}) end
    if inline and not long and after and after.t == 'Str' and after.text:match('^[%.,;:%)%?!]') then
      inlines[i] = pandoc.Span({math, after}, {class = 'nowrap'})
      inlines:remove(i + 1)
    end
  end
  return inlines
end

-- Under the title: the notebook, in Colab and on GitHub
local function notebook_links()
  local path = page_path()
  local repo = address['repo-url']
  if not repo or not path:match('%.ipynb$') then return end
  local branch = address['repo-branch'] or 'main'
  local file = '/blob/' .. branch .. '/nbs/' .. path
  local colab = repo:gsub('^https://github.com', 'https://colab.research.google.com/github') .. file
  local links = {
    pandoc.Link('Open in Colab', colab), pandoc.Str(' · '), pandoc.Link('Notebook', repo .. file)}
  return pandoc.Div({pandoc.Plain(links)}, {class = 'notebook-links'})
end

-- Quarto loads require.js and jQuery from another host wherever a cell shows a table: no page needs them
local function drop_scripts(meta)
  local includes = meta['header-includes']
  if not includes then return end
  meta['header-includes'] = pandoc.List(includes):filter(function(part)
    local raw = pandoc.utils.type(part) == 'Blocks' and part[1] or part
    return not (raw and raw.text and raw.text:find('require.min.js', 1, true))
  end)
end

-- The quotation under the title describes the page
local function describe(doc)
  for i, b in ipairs(doc.blocks) do
    if b.t == 'BlockQuote' and i < 4 then
      doc.meta.description = doc.meta.description or b.content
      doc.meta['description-meta'] = doc.meta['description-meta'] or stringify(b)
      doc.blocks:remove(i)
      return
    end
  end
end

function Pandoc(doc)
  drop_scripts(doc.meta)
  doc.blocks = one_listing(doc.blocks):walk({
    traverse = 'topdown',
    Header = function(h) return h:walk({Link = local_link}), false end,
    Link = function(l) return local_link(l) or l, false end,
    Code = function(c) return torch_link(c), false end,
  }):walk({Inlines = keep_together, Div = function(d) return fold_drawing(d) or name_folded(d) end})
  describe(doc)
  local links = notebook_links()
  if links then doc.blocks:insert(1, links) end
  return doc
end
