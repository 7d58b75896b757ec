package deployments

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

// reader parses one YAML document, strictly unless it is lax, and notes up to maxProblems mistakes with their places.
// It parses JSON too, which is YAML.
type reader struct {
	file string
	// unknownVariables is set if the text may contain the placeholder variable. A bad value that contains it is no
	// mistake.
	unknownVariables bool
	// lax is set for manifests. A field without a value then counts as left out, and anchors and aliases are read. Fields
	// that begin with x- are ignored, as people keep anchors in them.
	lax      bool
	anchors  map[string]ast.Node
	aliases  int // how many aliases were followed
	problems Problems
}

// parse returns the document's root. It returns nil if the text is empty. If the text isn't one YAML document within
// bounds, parse notes a problem and returns nil. It refuses tags. Unless the reader is lax, it also refuses anchors,
// aliases and merge keys: a few lines of them can expand without bound.
func (r *reader) parse(data []byte, max int) ast.Node {
	switch {
	case len(data) > max:
		r.note(0, 0, "the file has %d bytes, at most %d are allowed", len(data), max)
		return nil
	case !utf8.Valid(data):
		r.note(0, 0, "the file is not UTF-8 text")
		return nil
	}
	data = bytes.ReplaceAll(bytes.TrimPrefix(data, []byte("\ufeff")), []byte("\r\n"), []byte("\n"))
	if line := controlAt(data); line > 0 {
		r.note(line, 1, "the line contains a control character")
		return nil
	}
	switch deep, keys, documents := estimateShape(data); {
	case deep > maxDepth:
		r.note(0, 0, "the file is nested deeper than %d levels", maxDepth)
		return nil
	case keys > maxKeys:
		r.note(0, 0, "the file has %d keys and items, at most %d are allowed", keys, maxKeys)
		return nil
	case documents > maxDocuments:
		r.note(0, 0, "the file holds %d documents: want one", documents)
		return nil
	}
	// The method fields reports duplicate keys instead, so that all of them are found.
	f, err := parser.ParseBytes(data, 0, parser.AllowDuplicateMapKey())
	var syntax yaml.Error
	switch {
	case errors.As(err, &syntax) && syntax.GetToken() != nil:
		at := syntax.GetToken().Position
		r.note(at.Line, at.Column, "%s", syntax.GetMessage())
		return nil
	case err != nil:
		r.note(0, 0, "%v", err)
		return nil
	}
	var root ast.Node
	for _, doc := range f.Docs {
		if doc.Body == nil || doc.Body.Type() == ast.CommentType {
			continue
		}
		if root != nil {
			r.noteAt(doc.Body, "the file holds a second document: want one")
			return nil
		}
		root = doc.Body
	}
	if root == nil {
		return nil
	}
	before := len(r.problems)
	if r.lax {
		ast.Walk(anchorFinder{r}, root)
	} else {
		ast.Walk(refuser{r}, root)
	}
	if len(r.problems) > before {
		return nil
	}
	return r.resolve(root)
}

const (
	// maxDepth bounds nesting, as the parser recurses. maxKeys bounds keys and items together, maxDocuments the documents.
	// The parser's time grows with the square of either number, to some 0.5 s at the bound.
	maxDepth     = 40
	maxKeys      = 10_000
	maxDocuments = 100
	// maxProblems bounds the problems noted for one file.
	maxProblems = 100
)

// estimateShape returns estimates of the nesting depth of data, of its keys and items together, and of its documents.
// The depth is judged by flow brackets, indentation and dashes. The estimate errs on the high side.
func estimateShape(data []byte) (deep, keys, documents int) {
	flow, most := 0, 0
	for line := range bytes.Lines(data) {
		if bytes.HasPrefix(line, []byte("---")) {
			documents++
		}
		lead := 0
		for _, c := range line {
			if c != ' ' && c != '\t' && c != '-' && c != '?' && c != ':' {
				break
			}
			lead++
		}
		if bytes.IndexByte(line, ':') >= 0 || bytes.ContainsAny(line[:lead], "?-") {
			keys++
		}
		most = max(most, lead/2)
		for _, c := range line {
			switch c {
			case '[', '{':
				flow++
				most = max(most, flow)
			case ',':
				if flow > 0 {
					keys++
				}
			case ']', '}':
				flow = max(0, flow-1)
			}
		}
	}
	return most, keys, documents
}

func controlAt(data []byte) int {
	i := bytes.IndexFunc(data, func(c rune) bool { return c < ' ' && c != '\n' && c != '\t' || c == 0x7f })
	if i < 0 {
		return 0
	}
	return 1 + bytes.Count(data[:i], []byte("\n"))
}

// refuser notes anchors, aliases, merge keys and tags as mistakes.
type refuser struct{ r *reader }

func (v refuser) Visit(n ast.Node) ast.Visitor {
	switch n.Type() {
	case ast.AnchorType, ast.AliasType, ast.MergeKeyType:
		v.r.noteAt(n, "anchors, aliases and merge keys are not read here: write the value out")
		return nil
	case ast.TagType:
		v.r.noteAt(n, "tags are not read here: write the plain value")
		return nil
	}
	return v
}

func (r *reader) note(line, column int, format string, args ...any) {
	switch n := len(r.problems); {
	case n == maxProblems:
		r.problems = append(r.problems,
			Problem{File: r.file, Message: fmt.Sprintf("more than %d mistakes; some of them:", n)})
	case n < maxProblems:
		r.problems = append(r.problems,
			Problem{File: r.file, Line: line, Column: column, Message: fmt.Sprintf(format, args...)})
	}
}

func (r *reader) noteAt(n ast.Node, format string, args ...any) {
	line, column := position(n)
	r.note(line, column, format, args...)
}

// position returns the line and column at which a node begins, or 0, 0 if unknown or if n is nil.
func position(n ast.Node) (line, column int) {
	if n == nil {
		return 0, 0
	}
	if m, ok := n.(*ast.MappingNode); ok && len(m.Values) > 0 && !m.IsFlowStyle {
		// A block mapping's own token is its first colon.
		if t := m.Values[0].Key.GetToken(); t != nil {
			return t.Position.Line, t.Position.Column
		}
	}
	if t := n.GetToken(); t != nil && t.Position != nil {
		return t.Position.Line, t.Position.Column
	}
	return 0, 0
}

// err returns the problems that were found, in order; nil: none.
func (r *reader) err() error {
	if len(r.problems) == 0 {
		return nil
	}
	slices.SortStableFunc(r.problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return r.problems
}

// fields reads a mapping: for each key it calls the function of that name in known. It notes
// unknown and duplicate keys, and keys without a value. A lax reader passes over keys without a
// value, unknown ones that begin with x-, and empty texts of leftOutEmpty. seen has the key's node
// for each field that was read. what names the mapping in errors.
func (r *reader) fields(n ast.Node, what string, known map[string]func(ast.Node)) (seen map[string]ast.Node) {
	seen = map[string]ast.Node{}
	values, ok := r.entries(n)
	if !ok {
		r.noteAt(n, "%s: want fields, as in \"name: value\"", what)
	}
	for _, v := range values {
		name, value := keyOf(v), r.resolve(v.Value)
		read, ok := known[name]
		switch {
		case !ok && r.lax && strings.HasPrefix(name, "x-"):
			continue
		case !ok:
			r.noteAt(v.Key, "unknown field %q in %s%s", clip(name), what, didYouMean(name, known))
			continue
		case seen[name] != nil:
			r.noteAt(v.Key, "field %q is given twice in %s", name, what)
			continue
		case empty(value), r.lax && slices.Contains(leftOutEmpty, name) && isEmptyText(value):
			if !r.lax {
				r.noteAt(v.Key, "field %q has no value: give one, or remove the line", name)
			}
			continue
		}
		seen[name] = v.Key
		read(value)
	}
	return seen
}

// leftOutEmpty are the manifest fields that stretcher treats as absent if they are empty.
var leftOutEmpty = []string{"src", "checksum", "dest", "sync_strategy", "exclude_from"}

func isEmptyText(n ast.Node) bool {
	s, ok := n.(*ast.StringNode)
	return ok && s.Value == ""
}

// mapping returns a mapping's entries, and false if n is no mapping. goccy may represent a mapping of one entry by a
// node of another type.
func mapping(n ast.Node) ([]*ast.MappingValueNode, bool) {
	switch m := n.(type) {
	case *ast.MappingNode:
		return m.Values, true
	case *ast.MappingValueNode:
		return []*ast.MappingValueNode{m}, true
	}
	return nil, false
}

// keyOf returns an entry's key, without its quotes.
func keyOf(v *ast.MappingValueNode) string {
	if s, ok := v.Key.(*ast.StringNode); ok {
		return s.Value
	}
	return v.Key.GetToken().Value
}

// didYouMean returns a hint that names the known field nearest to a misspelt one; empty: none is near.
func didYouMean[T any](name string, known map[string]T) string {
	if best := Nearest(name, maps.Keys(known)); best != "" {
		return fmt.Sprintf(": did you mean %q?", best)
	}
	return ""
}

// Nearest returns the known name nearest to a misspelt one, at most two edits away; empty: there is none.
func Nearest(name string, known iter.Seq[string]) string {
	best, least := "", 3
	for k := range known {
		if d := distance(name, k); d < least || d == least && k < best && best != "" {
			best, least = k, d
		}
	}
	return best
}

// distance returns the Levenshtein distance of a and b, with a swap of neighbouring bytes as one step. If a has more
// than 64 bytes, it returns len(a).
func distance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}

// text returns a scalar's text, numbers as they were written; for any other node it notes a problem and returns false.
func (r *reader) text(n ast.Node) (string, bool) {
	switch s := n.(type) {
	case *ast.StringNode:
		return s.Value, true
	case *ast.LiteralNode:
		return s.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return strings.TrimSpace(n.GetToken().Value), true
	}
	r.noteAt(n, "want a single value here")
	return "", false
}

// into returns a function for fields that parses a scalar into *to. The error of parse is noted at the scalar's place,
// unless the value contains an unknown variable.
func into[T any](r *reader, to *T, parse func(string) (T, error)) func(ast.Node) {
	return func(n ast.Node) {
		s, ok := r.text(n)
		if !ok {
			return
		}
		v, err := parse(s)
		if err != nil {
			if !r.unknownVariables || !strings.Contains(s, variable) {
				r.noteAt(n, "%v", err)
			}
			return
		}
		*to = v
	}
}

// intoList is into for a sequence; a single scalar is a list of one.
func intoList[T any](r *reader, to *[]T, parse func(string) (T, error)) func(ast.Node) {
	return func(n ast.Node) {
		r.each(n, func(item ast.Node) {
			var v T
			before := len(r.problems)
			into(r, &v, parse)(item)
			if len(r.problems) == before {
				*to = append(*to, v)
			}
		})
	}
}

// each calls f with every item of a sequence, or with n itself if it is no sequence. A lax reader passes over items
// without a value.
func (r *reader) each(n ast.Node, f func(ast.Node)) {
	s, ok := n.(*ast.SequenceNode)
	if !ok {
		f(n)
		return
	}
	for _, item := range s.Values {
		if item = r.resolve(item); empty(item) {
			if !r.lax {
				r.noteAt(n, "the list has an item without a value")
			}
			continue
		}
		f(item)
	}
}

func asText(s string) (string, error) { return s, nil }

// asFilled accepts any text but blanks.
func asFilled(s string) (string, error) {
	if strings.TrimSpace(s) == "" {
		return "", errors.New("the text is empty: fill it in, or remove the line")
	}
	return s, nil
}

func asBool(s string) (bool, error) {
	switch s {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, fmt.Errorf("%q: want true or false", clip(s))
}

// asNumber returns a parser of whole numbers from least to most.
func asNumber(least, most int64) func(string) (int64, error) {
	return func(s string) (int64, error) {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil || n < least || n > most {
			return 0, fmt.Errorf("%q: want a whole number from %d to %d", clip(s), least, most)
		}
		return n, nil
	}
}

func asInt(least, most int64) func(string) (int, error) {
	return func(s string) (int, error) {
		n, err := asNumber(least, most)(s)
		return int(n), err
	}
}

// maxDuration bounds the durations in manifests and in the files of a deployments repo.
const maxDuration = 365 * 24 * time.Hour

func asDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 || d > maxDuration {
		return 0, fmt.Errorf("%q: want a duration, as in 30s, 5m or 1h30m, of at most %d hours", clip(s),
			int(maxDuration.Hours()))
	}
	return d, nil
}

func asAmount(s string) (Amount, error) {
	number, percent := strings.CutSuffix(s, "%")
	most := int64(1_000_000)
	if percent {
		most = 100
	}
	n, err := asNumber(0, most)(number)
	if err != nil {
		return Amount{}, fmt.Errorf("%q: want a number of nodes, as in 2, or a percentage, as in 10%%", clip(s))
	}
	return Amount{N: int(n), Percent: percent}, nil
}

// asOneOf returns a parser that accepts one of the given words.
func asOneOf[T ~string](words ...T) func(string) (T, error) {
	return func(s string) (T, error) {
		if !slices.Contains(words, T(s)) {
			quoted := make([]string, len(words))
			for i, w := range words {
				quoted[i] = string(w)
			}
			return "", fmt.Errorf("%q: want %s", clip(s), strings.Join(quoted, " or "))
		}
		return T(s), nil
	}
}
