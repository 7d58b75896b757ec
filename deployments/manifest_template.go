package deployments

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/template/parse"

	"kedge/deployments/safetext"
)

const (
	// maxActions bounds the number of actions ({{ }}) in a manifest. The parser takes some 2 kB of memory for each, and
	// recurses into nested ones.
	maxActions = 2000
	// maxWidth bounds widths and precisions in a format: a few bytes could ask for megabytes.
	maxWidth = 1000
	// maxDollars bounds the dollar signs in a manifest with actions. Both the parser and expand
	// look for a template's variable among all those before. So their time grows with the square of
	// this number, to some 0.2 s.
	maxDollars = 10_000
	// maxWork bounds the bytes that a template's functions take and return, added up over all calls. A
	// variable that is given as an argument twice may double with each action. argumentCost is how
	// many bytes an argument counts for besides its own.
	maxWork      = 8 * MaxManifest
	argumentCost = 64
	// maxParseError bounds what is kept of the parser's errors, in bytes. They quote words of any length.
	maxParseError = 300
)

// expansion is a manifest's text after its template actions were executed.
type expansion struct {
	text string
	// values are the environment variables that were read, with their values.
	values []variableValue
	// spans are the lines that actions wrote. written are the variables that these depend on, at
	// most maxNames.
	spans   []span
	written []string
	// conditions counts the conditions that depend on a variable whose value isn't known here.
	conditions int
}

// span is a run of lines (from 1) that an action wrote. names are the variables that the action
// depends on, at most maxNames.
type span struct {
	first, last int
	names       []string
}

// namesAt returns the variables that the actions in a line depend on, at most maxNames.
func (e expansion) namesAt(line int) (names []string) {
	for _, s := range e.spans {
		if s.first <= line && line <= s.last {
			names = union(names, s.names)
		}
	}
	return names
}

// template is a manifest's text, with its actions parsed.
type template struct {
	text string
	tree *parse.Tree // nil: the text has no actions
	work int         // the bytes that functions have taken and returned so far, in all expansions; see maxWork
}

// parseTemplate parses a manifest's text. A template may use stretcher's env, must_env and
// json_escape. Of text/template it may use if, with, variables, and the other functions in the map
// functions. There are no loops, calls or nested templates, and what functions may take is bounded,
// so that an unchecked text can't run for long.
func parseTemplate(text string) (*template, error) {
	if !strings.Contains(text, "{{") {
		return &template{text: text}, nil
	}
	if n := strings.Count(text, "{{"); n > maxActions {
		return nil, fmt.Errorf("it has %d actions ({{ }}), at most %d are allowed", n, maxActions)
	}
	if n := strings.Count(text, "$"); n > maxDollars {
		return nil, fmt.Errorf("it has %d dollar signs; at most %d are allowed beside actions ({{ }})", n, maxDollars)
	}
	known := map[string]any{}
	for name := range functions {
		known[name] = ""
	}
	trees, err := parse.Parse("manifest", text, "", "", known)
	if err != nil {
		return nil, errors.New(safetext.Cut(err.Error(), maxParseError)) // it quotes the text alone, no value
	}
	tree := trees["manifest"]
	if tree == nil || tree.Root == nil || len(trees) > 1 {
		return nil, errors.New("templates can't be defined in a manifest")
	}
	return &template{text: text, tree: tree}, nil
}

// chooser decides how a condition that depends on a variable turns out. Conditions are numbered
// from 0, in the order in which they are reached. yes is the outcome with the values that the
// variables have here.
type chooser func(condition int, yes bool) bool

// expand executes the template's actions. If choose is nil, the variables are known, and each
// condition is evaluated. If choose isn't nil, it decides the conditions that depend on a variable.
func (t *template) expand(env func(string) (string, bool), choose chooser) (expansion, error) {
	if t.tree == nil {
		return expansion{text: t.text}, nil
	}
	e := &expander{template: t, env: env, choose: choose, line: 1, seen: map[variableValue]bool{}}
	if err := e.list(t.tree.Root, nil); err != nil {
		return expansion{}, err
	}
	e.result.text = e.out.String()
	return e.result, nil
}

// expander executes a parsed template. Its errors name variables and types, and quote no value.
type expander struct {
	*template
	env    func(string) (string, bool)
	choose chooser
	out    strings.Builder
	line   int // the line that out ends in
	vars   []templateVariable
	used   []string // environment variables that the current evaluation used so far, at most maxNames
	result expansion
	seen   map[variableValue]bool // the entries of result.values
}

// variableValue is an environment variable with its value.
type variableValue struct{ name, value string }

// templateVariable is a variable of the template, such as $name. The dot, and what is piped into a command, are
// variables without a name.
type templateVariable struct {
	name  string
	value any
	// from are the environment variables that value depends on, at most maxNames.
	from []string
}

// maxNames bounds how many names of variables are kept for a value or a line. Messages have no room for more.
const maxNames = 16

// union returns the names in a and b, each once, and at most maxNames of them. It is empty only if a and b are.
func union(a, b []string) []string {
	all := slices.Clip(a) // so that append copies it, as others may hold it
	for _, name := range b {
		if len(all) < maxNames && !slices.Contains(all, name) {
			all = append(all, name)
		}
	}
	return all
}

// get returns the value of a template's variable, and records that the current evaluation depends on it.
func (e *expander) get(v *templateVariable) any {
	e.used = union(e.used, v.from)
	return v.value
}

// evaluate calls f, and returns its value with the environment variables that it depends on.
func (e *expander) evaluate(f func() (any, error)) (*templateVariable, error) {
	outer := e.used
	e.used = nil
	value, err := f()
	v := &templateVariable{value: value, from: e.used}
	e.used = union(outer, v.from)
	return v, err
}

func (e *expander) list(list *parse.ListNode, dot *templateVariable) error {
	if list == nil {
		return nil
	}
	scope := len(e.vars)
	defer func() { e.vars = e.vars[:scope] }()
	for _, node := range list.Nodes {
		if err := e.node(node, dot); err != nil {
			return err
		}
		if e.out.Len() > MaxManifest {
			return fmt.Errorf("the manifest has more than %d bytes once its variables are filled in", MaxManifest)
		}
	}
	return nil
}

func (e *expander) node(node parse.Node, dot *templateVariable) error {
	var err error
	switch n := node.(type) {
	case *parse.TextNode:
		e.write(string(n.Text), nil)
	case *parse.CommentNode:
	case *parse.ActionNode:
		e.used = nil
		var value any
		if value, err = e.pipe(n.Pipe, dot); err == nil && len(n.Pipe.Decl) == 0 {
			e.write(fmt.Sprint(value), e.used)
		}
	case *parse.IfNode:
		err = e.branch(&n.BranchNode, dot, false)
	case *parse.WithNode:
		err = e.branch(&n.BranchNode, dot, true)
	default:
		err = errors.New("a manifest's template may use only {{ if }}, {{ with }} and functions, as in {{ env \"NAME\" }}")
	}
	if located := new(locatedError); err == nil || errors.As(err, &located) {
		return err
	}
	where, _ := e.tree.ErrorContext(node)
	return &locatedError{fmt.Errorf("%s: %w", where, err)}
}

// locatedError is an error that already says on which line it is.
type locatedError struct{ error }

func (e *locatedError) Unwrap() error { return e.error }

// write appends text that depends on the named variables.
func (e *expander) write(text string, names []string) {
	e.out.WriteString(text)
	e.result.written = union(e.result.written, names)
	first := e.line
	e.line += strings.Count(text, "\n")
	if len(names) > 0 {
		e.result.spans = append(e.result.spans, span{first, e.line, names})
	}
}

func (e *expander) branch(n *parse.BranchNode, dot *templateVariable, with bool) error {
	scope := len(e.vars)
	defer func() { e.vars = e.vars[:scope] }()
	e.used = nil
	value, err := e.pipe(n.Pipe, dot)
	if err != nil {
		return err
	}
	yes := truth(value)
	if e.choose != nil && len(e.used) > 0 {
		yes = e.choose(e.result.conditions, yes)
		e.result.conditions++
	}
	if !yes {
		return e.list(n.ElseList, dot)
	}
	if with {
		dot = &templateVariable{value: value, from: e.used}
	}
	return e.list(n.List, dot)
}

func (e *expander) pipe(p *parse.PipeNode, dot *templateVariable) (any, error) {
	var last *templateVariable
	for _, c := range p.Cmds {
		value, err := e.evaluate(func() (any, error) { return e.command(c, dot, last) })
		if err != nil {
			return nil, err
		}
		last = value
	}
	for _, d := range p.Decl {
		if !p.IsAssign {
			e.vars = append(e.vars, templateVariable{d.Ident[0], last.value, last.from})
			continue
		}
		for i := len(e.vars) - 1; i >= 0; i-- {
			if e.vars[i].name == d.Ident[0] {
				e.vars[i].value, e.vars[i].from = last.value, last.from
				break
			}
		}
	}
	return last.value, nil
}

// command evaluates one command of a pipeline. piped is the result of the command before; nil: this is the first.
func (e *expander) command(c *parse.CommandNode, dot, piped *templateVariable) (any, error) {
	name, ok := c.Args[0].(*parse.IdentifierNode)
	if !ok {
		if len(c.Args) > 1 || piped != nil {
			return nil, errors.New("only functions take arguments")
		}
		return e.arg(c.Args[0], dot)
	}
	if err := e.spend(argumentCost * len(c.Args)); err != nil {
		return nil, err
	}
	args := make([]func() (any, error), 0, len(c.Args))
	for _, a := range c.Args[1:] {
		args = append(args, func() (any, error) { return e.arg(a, dot) })
	}
	if piped != nil {
		args = append(args, func() (any, error) { return e.get(piped), nil })
	}
	value, err := e.call(name.Ident, args)
	if called := new(callError); err == nil || errors.As(err, &called) {
		return value, err
	}
	return nil, &callError{fmt.Errorf("%s: %w", name.Ident, err)}
}

// callError is an error that already names the function. Calls around that one aren't named: there may be thousands.
type callError struct{ error }

func (e *callError) Unwrap() error { return e.error }

// spend counts bytes that a function takes or returns towards maxWork.
func (e *expander) spend(bytes int) error {
	if e.work += bytes; e.work > maxWork {
		return fmt.Errorf("what its template's functions take and return has more than %d bytes: use fewer or shorter "+
			"variables", maxWork)
	}
	return nil
}

func (e *expander) arg(n parse.Node, dot *templateVariable) (any, error) {
	switch n := n.(type) {
	case *parse.StringNode:
		return n.Text, nil
	case *parse.BoolNode:
		return n.True, nil
	case *parse.NumberNode:
		switch {
		case n.IsInt:
			return n.Int64, nil
		case n.IsFloat:
			return n.Float64, nil
		}
	case *parse.DotNode:
		if dot != nil {
			return e.get(dot), nil
		}
	case *parse.VariableNode:
		for i := len(e.vars) - 1; i >= 0 && len(n.Ident) == 1; i-- {
			if e.vars[i].name == n.Ident[0] {
				return e.get(&e.vars[i]), nil
			}
		}
	case *parse.PipeNode:
		return e.pipe(n, dot)
	case *parse.IdentifierNode:
		return e.call(n.Ident, nil)
	}
	return nil, fmt.Errorf("%s: a manifest's template can use environment variables only, as in {{ env \"NAME\" }}",
		clip(n.String()))
}

// functions are all functions of templates, each with the least and the most arguments it takes (-1: no bound).
var functions = map[string]struct{ least, most int }{
	"env": {1, -1}, "must_env": {1, 1}, "json_escape": {1, 1},
	"printf": {1, -1}, "print": {0, -1}, "println": {0, -1},
	"eq": {2, -1}, "ne": {2, 2}, "lt": {2, 2}, "le": {2, 2}, "gt": {2, 2}, "ge": {2, 2},
	"and": {1, -1}, "or": {1, -1}, "not": {1, 1}, "len": {1, 1},
}

// functionUsage has usage examples for functions that people often call wrongly.
var functionUsage = map[string]string{
	"env": `want {{ env "NAME" "otherwise" }}`, "must_env": `want {{ must_env "NAME" }}`,
}

func (e *expander) call(name string, args []func() (any, error)) (any, error) {
	f := functions[name]
	if len(args) < f.least || f.most >= 0 && len(args) > f.most {
		if usage := functionUsage[name]; usage != "" {
			return nil, errors.New(usage)
		}
		return nil, fmt.Errorf("wrong number of arguments: %d", len(args))
	}
	if name == "and" || name == "or" { // and, or evaluate only as many arguments as they need
		var value any
		var err error
		for _, a := range args {
			if value, err = a(); err != nil || truth(value) == (name == "or") {
				return value, err
			}
		}
		return value, nil
	}
	values := make([]any, len(args))
	from := make([][]string, len(args))
	for i, a := range args {
		v, err := e.evaluate(a)
		if err != nil {
			return nil, err
		}
		values[i], from[i] = v.value, v.from
	}
	if err := e.spend(textSize(values...)); err != nil {
		return nil, err
	}
	value, err := e.apply(name, values, from)
	if s, ok := value.(string); err == nil && ok {
		if err = checkResult(len(s)); err == nil {
			err = e.spend(len(s))
		}
	}
	return value, err
}

// textSize returns an upper bound of the bytes that print or %f writes for the values, without
// separators.
func textSize(values ...any) int {
	size := 0
	for _, v := range values {
		switch v := v.(type) {
		case string:
			size += len(v)
		case float64:
			size += 350 // the largest one has 309 digits before its point
		default:
			size += 20
		}
	}
	return size
}

// checkResult returns an error if a function's result of size bytes is larger than a manifest may be.
func checkResult(size int) error {
	if size > MaxManifest {
		return fmt.Errorf("the result has more than %d bytes, which is the limit of a whole manifest", MaxManifest)
	}
	return nil
}

// apply calls a function other than and, or. from are the environment variables that each value
// depends on, at most maxNames.
func (e *expander) apply(name string, values []any, from [][]string) (any, error) {
	switch name {
	case "env", "must_env", "json_escape":
		var words []word
		for i, v := range values {
			s, ok := v.(string)
			if !ok {
				return nil, errors.New("it takes only text")
			}
			words = append(words, word{s, from[i]})
		}
		return e.text(name, words)
	case "printf":
		return format(values)
	case "print", "println":
		if err := checkResult(textSize(values...)); err != nil {
			return nil, err
		}
		if name == "print" {
			return fmt.Sprint(values...), nil
		}
		return fmt.Sprintln(values...), nil
	case "not":
		return !truth(values[0]), nil
	case "len":
		if s, ok := values[0].(string); ok {
			return int64(len(s)), nil
		}
		return nil, errors.New("it takes only text")
	default:
		return compare(name, values)
	}
}

// word is an argument of env, must_env or json_escape. If it depends on the environment variables from, it may be
// the value of one of them, and must not be shown.
type word struct {
	text string
	from []string
}

// text calls one of stretcher's functions. As in stretcher, env returns the value of the first variable of its words
// that is set and not empty. If there is none, env returns the last word itself.
func (e *expander) text(name string, words []word) (string, error) {
	switch name {
	case "env":
		for _, w := range words {
			if v, ok := e.env(w.text); ok && v != "" {
				e.recordRead(w, v)
				return v, nil
			}
			e.recordDependency(w)
		}
		return words[len(words)-1].text, nil
	case "must_env":
		w := words[0]
		v, ok := e.env(w.text)
		if !ok {
			shown := clip(w.text)
			if len(w.from) > 0 {
				shown = "that the value of " + shownNames(w.from) + " names"
			}
			return "", fmt.Errorf("the environment variable %s is not set on this node, and the manifest needs it", shown)
		}
		e.recordRead(w, v)
		return v, nil
	default:
		quoted, err := json.Marshal(words[0].text)
		if err != nil {
			return "", err
		}
		return string(quoted[1 : len(quoted)-1]), nil
	}
}

// recordRead records that the template has read the variable that w names.
func (e *expander) recordRead(w word, value string) {
	e.recordDependency(w)
	if v := (variableValue{w.text, value}); !e.seen[v] {
		e.seen[v] = true
		e.result.values = append(e.result.values, v)
	}
}

// recordDependency records that the current action depends on the variable that w names, set or
// not. A name that is a variable's value itself is left out: the action depends on that variable,
// too.
func (e *expander) recordDependency(w word) {
	if len(w.from) == 0 {
		e.used = union(e.used, []string{w.text})
	}
}

// shownNames lists the names of variables for people, cut if they are long.
func shownNames(names []string) string {
	return clip(strings.Join(slices.Sorted(slices.Values(names)), ", "))
}

// truth returns text/template's truth of a value: anything but false, empty text, zero and nil is true.
func truth(value any) bool {
	switch v := value.(type) {
	case string:
		return v != ""
	case bool:
		return v
	case int64:
		return v != 0
	case float64:
		return v != 0
	}
	return false
}

// format is printf with the verbs s, v, d, q, t and f. It returns an error if the result could have more than
// 8*MaxManifest bytes.
func format(values []any) (string, error) {
	layout, ok := values[0].(string)
	if !ok {
		return "", errors.New("want a format")
	}
	size := 6 * textSize(values...) // %q may write 6 bytes for one; so may a verb without a value for each of its bytes
	for rest := layout; ; {
		_, verb, found := strings.Cut(rest, "%")
		if !found {
			break
		}
		end := strings.IndexFunc(verb, func(c rune) bool { return !strings.ContainsRune("+- #0123456789.", c) })
		if end < 0 || !strings.ContainsRune("svdqtf%", rune(verb[end])) {
			return "", errors.New("a format's verbs are %s %v %d %q %t %f and %%")
		}
		for _, digits := range strings.FieldsFunc(verb[:end], func(c rune) bool { return c < '0' || c > '9' }) {
			if len(digits) > 4 {
				return "", fmt.Errorf("a format's width and precision are at most %d", maxWidth)
			}
			width := 0
			for _, d := range digits {
				width = 10*width + int(d-'0')
			}
			if width > maxWidth {
				return "", fmt.Errorf("a format's width and precision are at most %d", maxWidth)
			}
			size += width
		}
		rest = verb[end+1:]
	}
	if err := checkResult(size / 8); err != nil {
		return "", err
	}
	return fmt.Sprintf(layout, values[1:]...), nil
}

// compare returns the result of the comparison name, from eq to ge, of values of one type; other values are an error.
// eq reports whether the first value equals one of the others.
func compare(name string, values []any) (bool, error) {
	order := func(a, b any) (int, error) {
		switch x := a.(type) {
		case string:
			if y, ok := b.(string); ok {
				return cmp.Compare(x, y), nil
			}
		case int64:
			if y, ok := b.(int64); ok {
				return cmp.Compare(x, y), nil
			}
		case float64:
			if y, ok := b.(float64); ok {
				return cmp.Compare(x, y), nil
			}
		case bool:
			if y, ok := b.(bool); ok && (name == "eq" || name == "ne") {
				return map[bool]int{true: 0, false: 1}[x == y], nil
			}
		}
		return 0, errors.New("it compares values of one type: text with text, numbers with numbers")
	}
	for _, other := range values[1:] {
		c, err := order(values[0], other)
		if err != nil {
			return false, err
		}
		if map[string]bool{"eq": c == 0, "ne": c != 0, "lt": c < 0, "le": c <= 0, "gt": c > 0, "ge": c >= 0}[name] {
			return true, nil
		}
	}
	return false, nil
}

// hide replaces the messages of problems that could reveal a variable's value. These are messages about a line with
// such a value, and those that contain what looks like a part of one.
func (e expansion) hide(problems Problems) {
	if len(e.values) == 0 {
		return
	}
	grams := map[string]bool{}
	for _, v := range e.values {
		for gram := range gramsOf(v.value) {
			grams[gram] = true
		}
	}
	for i := range problems {
		p := &problems[i]
		names := e.namesAt(p.Line)
		if len(names) == 0 {
			for gram := range gramsOf(p.Message) {
				if grams[gram] {
					names = e.written
					break
				}
			}
		}
		if len(names) > 0 {
			p.Message = fmt.Sprintf("this line isn't valid with this node's environment: check %s, whose value is not shown",
				shownNames(names))
		}
	}
}

// gramsOf yields each run of four bytes in a text's letters, digits and characters beyond ASCII, as
// if the text had no other characters. A comparison by these runs finds a part of a value even if
// that was quoted, escaped or cut.
func gramsOf(s string) func(yield func(string) bool) {
	const n = 4
	plain := strings.Map(func(c rune) rune {
		if c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= 0x80 {
			return c
		}
		return -1
	}, s)
	return func(yield func(string) bool) {
		for i := 0; i+n <= len(plain); i++ {
			if !yield(plain[i : i+n]) {
				return
			}
		}
	}
}
