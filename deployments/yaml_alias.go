package deployments

import (
	"github.com/goccy/go-yaml/ast"
)

// maxAliases bounds how often aliases are followed in a document, as each may stand for most of the document.
const maxAliases = 200

// anchorFinder collects the document's anchors. It notes an alias before its anchor, a name used by two anchors, and
// tags, as mistakes.
type anchorFinder struct{ r *reader }

func (v anchorFinder) Visit(n ast.Node) ast.Visitor {
	switch n := n.(type) {
	case *ast.AnchorNode:
		name := n.Name.GetToken().Value
		if v.r.anchors[name] != nil {
			v.r.noteAt(n, "the anchor &%s is given twice: give each a name of its own", clip(name))
			return nil
		}
		if v.r.anchors == nil {
			v.r.anchors = map[string]ast.Node{}
		}
		v.r.anchors[name] = n.Value
	case *ast.AliasNode:
		if name := n.Value.GetToken().Value; v.r.anchors[name] == nil {
			v.r.noteAt(n, "there is no anchor &%s before this", clip(name))
		}
		return nil
	case *ast.TagNode:
		v.r.noteAt(n, "tags are not read here: write the plain value")
		return nil
	}
	return v
}

// resolve returns the node that the alias n stands for, or n itself if it is no alias, without its
// anchor. Once more than maxAliases aliases were followed in the document, resolve returns nil.
func (r *reader) resolve(n ast.Node) ast.Node {
	for {
		switch v := n.(type) {
		case *ast.AnchorNode:
			n = v.Value
		case *ast.AliasNode:
			if r.aliases++; r.aliases > maxAliases {
				if r.aliases == maxAliases+1 {
					r.noteAt(v, "the document's aliases are followed more than %d times: write some values out", maxAliases)
				}
				return nil
			}
			n = r.anchors[v.Value.GetToken().Value]
		default:
			return n
		}
	}
}

// empty reports whether a resolved node is nil or has no value.
func empty(n ast.Node) bool { return n == nil || n.Type() == ast.NullType }

// entries returns a mapping's entries, and false if n is no mapping. If the reader is lax, entries
// adds those that merge keys (<<) bring. The mapping's own entries take precedence.
func (r *reader) entries(n ast.Node) ([]*ast.MappingValueNode, bool) {
	values, ok := mapping(n)
	if !ok || !r.lax {
		return values, ok
	}
	var own, merged []*ast.MappingValueNode
	for _, v := range values {
		if v.Key.Type() != ast.MergeKeyType {
			own = append(own, v)
			continue
		}
		from := []ast.Node{r.resolve(v.Value)}
		if list, ok := from[0].(*ast.SequenceNode); ok {
			from = from[:0]
			for _, item := range list.Values {
				from = append(from, r.resolve(item))
			}
		}
		for _, m := range from {
			more, ok := r.entries(m)
			if !ok {
				r.noteAt(v.Key, "<<: want an alias of fields")
			}
			merged = append(merged, more...)
		}
	}
	if len(merged) == 0 {
		return own, true
	}
	has := map[string]bool{}
	for _, v := range own {
		has[keyOf(v)] = true
	}
	for _, v := range merged {
		if name := keyOf(v); !has[name] {
			has[name] = true
			own = append(own, v)
		}
	}
	return own, true
}
