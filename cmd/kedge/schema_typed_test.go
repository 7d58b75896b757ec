package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"kedge/deployments"
)

// typed makes the schemas of what people type: each field's shape from here, its description from the reference of
// package deployments. TestSchemasAgreeWithParsers holds them against the parsers.
type typed struct {
	t      *testing.T
	blocks []map[string]string // of the format's section: descriptions by field
	lax    bool                // a field without a value counts as left out
}

type node = map[string]any

// newTyped reads the blocks of fields of a section of the reference.
func newTyped(t *testing.T, topic string, lax bool) *typed {
	page, ok := deployments.Page(topic)
	if !ok {
		t.Fatalf("the reference has no section %s", topic)
	}
	s := &typed{t: t, lax: lax}
	line := regexp.MustCompile(`^    ([a-z0-9_]+(?:, [a-z0-9_]+)*)  +(\S.*)$`)
	_, fields, _ := strings.Cut(page, "Its fields")
	fields = regexp.MustCompile(`\n {12,}`).ReplaceAllString(fields, " ") // lines that go on
	in := false
	for l := range strings.SplitSeq(fields, "\n") {
		m := line.FindStringSubmatch(l)
		if m == nil {
			in = in && l == ""
			continue
		}
		if !in {
			s.blocks, in = append(s.blocks, map[string]string{}), true
		}
		for _, name := range strings.Split(m[1], ", ") {
			s.blocks[len(s.blocks)-1][name] = regexp.MustCompile(`^of [a-z ]+: `).ReplaceAllString(m[2], "")
		}
	}
	return s
}

// object is a mapping with these fields, described by the block'th block of the section.
// Those that are required, and those in firm, can't be left empty where others can.
func (s *typed) object(block int, required []string, fields node, firm ...string) node {
	s.t.Helper()
	properties := node{}
	for name, field := range fields {
		about := s.blocks[block][name]
		if about == "" {
			s.t.Errorf("block %d of the reference doesn't describe %s", block, name)
		}
		described := node{"description": about}
		for key, value := range field.(node) {
			described[key] = value
		}
		if s.lax && !slices.Contains(required, name) && !slices.Contains(firm, name) {
			described = orNull(described)
		}
		properties[name] = described
	}
	o := node{"type": "object", "properties": properties, "additionalProperties": false}
	if len(required) > 0 {
		o["required"] = required
	}
	return o
}

// orNull lets a value be left out.
func orNull(n node) node {
	switch kind := n["type"].(type) {
	case string:
		n["type"] = []string{kind, "null"}
	case []string:
		n["type"] = append(append([]string{}, kind...), "null")
	default:
		about := n["description"]
		delete(n, "description")
		return node{"description": about, "anyOf": []node{n, {"type": "null"}}}
	}
	return n
}

// text is a scalar: 1.4 is the text "1.4". A pattern holds for texts.
func text(pattern string) node {
	n := node{"type": []string{"string", "number", "boolean"}}
	if pattern != "" {
		n["pattern"] = pattern
	}
	return n
}

// named is a text, or a number that has no sign.
func named(pattern string) node {
	n := text(pattern)
	n["minimum"] = 0
	return n
}

// word is a text that no number or truth value can be.
func word(pattern string) node { return node{"type": "string", "pattern": pattern} }

func (s *typed) list(of node) node {
	item := of
	if s.lax {
		item = node{"anyOf": []node{of, {"type": "null"}}}
	}
	return node{"anyOf": []node{of, {"type": "array", "items": item}}}
}

func oneOf(words ...string) node { return node{"enum": words} }

func number(least, most int) node {
	return node{"anyOf": []node{{"type": "integer", "minimum": least, "maximum": most}, word(`^[0-9]+$`)}}
}

const positive = `^\+?(([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h))+$`

var (
	truth    = node{"enum": []any{true, false, "true", "false"}}
	lasting  = node{"type": "string", "pattern": positive} // at most a year
	duration = node{"anyOf": []node{{"type": "string", "pattern": "^[+-]?0$|" + positive}, {"const": 0}}}
	amount   = node{"anyOf": []node{{"type": "integer", "minimum": 0, "maximum": 1_000_000}, word(`^[0-9]+%?$`)}}
	some     = node{"anyOf": []node{{"type": "integer", "minimum": 1, "maximum": 1_000_000}, word(`^0*[1-9][0-9]*%?$`)}}
	percent  = node{"anyOf": []node{{"type": "integer", "minimum": 0, "maximum": 100}, word(`^[0-9]+%?$`)}}
	pointer  = word(`^[a-z0-9]+://.+@sha256:[0-9a-fA-F]{64}$`)
	name     = named(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	path     = word(`^/.`)
	account  = named(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$`)
	source   = word(`^(s3|gs|https?|file)://`)
)

// typedSchemas are the schemas of what people type, by kind.
func typedSchemas(t *testing.T) map[string]node {
	all := map[string]node{
		"unit": unitSchema(t), "kedge.yaml": settingsSchema(t), "manifest": manifestSchema(t), "agent.yaml": agentSchema(t),
	}
	for kind, title := range map[string]string{
		"unit":       "STAGE/ROLE/UNIT.yaml: one unit of a deployments repo",
		"kedge.yaml": "kedge.yaml: what holds for a whole deployments repo",
		"manifest":   "manifest.yaml: what a release is, and how it goes live",
		"agent.yaml": "/etc/kedge/agent.yaml: what an agent is and may do",
	} {
		all[kind]["$schema"] = "https://json-schema.org/draft/2020-12/schema"
		all[kind]["title"] = title
	}
	return all
}

func (s *typed) rollout(block int) node {
	return s.object(block, nil, node{
		"canary": amount, "bake": duration, "max_unavailable": some, "max_failures": amount, "deadline": lasting,
		"on_failure": oneOf("rollback", "pause"), "approval": oneOf("auto", "manual"), "fast_back": truth,
	})
}

func unitSchema(t *testing.T) node {
	s := newTyped(t, "unit", false)
	return s.object(0, []string{"release"}, node{
		"release": pointer, "after": s.list(name), "rollout": s.rollout(1), "drift": oneOf("report", "heal"), "adopt": truth,
	})
}

func settingsSchema(t *testing.T) node {
	s := newTyped(t, "kedge.yaml", false)
	byStage := func(of node) node {
		return node{"type": "object", "additionalProperties": of,
			"propertyNames": node{"pattern": `^(\*|[A-Za-z0-9][A-Za-z0-9._-]{0,62})$`}}
	}
	some := func(of node) node {
		return node{"anyOf": []node{of, {"type": "array", "items": of, "minItems": 1}}}
	}
	rollout := newTyped(t, "unit", false).rollout(1)
	freeze := s.object(1, []string{"duration"}, node{
		"name": text(""), "deny": word(""), "allow": word(""), "duration": lasting, "zone": word("."), "reason": text(""),
		"units": s.list(word(`^[^/]+/[^/]+/[^/]+$`)), "running": oneOf("finish", "wait"),
	})
	freeze["oneOf"] = []node{{"required": []string{"deny"}}, {"required": []string{"allow"}}}
	return s.object(0, nil, node{
		"sources": byStage(some(source)), "dests": byStage(some(path)), "users": byStage(some(account)),
		"commands": byStage(truth), "prune": truth, "max_removed": percent, "allow_rewind": truth, "rollout": rollout,
		"drift": oneOf("report", "heal"), "freeze": s.list(freeze),
	})
}

func manifestSchema(t *testing.T) node {
	s := newTyped(t, "manifest", true)
	digest := word(`^[0-9a-fA-F]{64}$`)
	object := number(1, 1<<50)
	command := s.object(3, []string{"run"}, node{
		"run": text("."), "timeout": lasting, "user": account, "once": truth,
	})
	commands := node{"$ref": "#/$defs/commands"}
	http := word(`^https?://`)
	checkKinds := []string{"http", "tcp", "exec", "systemd", "consul"}
	check := s.object(5, nil, node{
		"http": node{"anyOf": []node{http, s.object(5, []string{"url"},
			node{"url": http, "status": number(100, 599), "contains": text("")})}},
		"tcp": text(`\S`), "exec": text(`\S`), "user": account, "systemd": text(`\S`), "consul": text(`\S`),
		"interval": lasting, "timeout": lasting, "during": oneOf("deploy"),
	}, checkKinds...)
	var kinds []node
	for _, kind := range checkKinds {
		kinds = append(kinds, node{"required": []string{kind}})
	}
	check["oneOf"] = kinds
	delta := s.object(1, []string{"from", "url", "size", "sha256"},
		node{"from": digest, "url": text("^[^/]"), "size": object, "sha256": digest})
	m := s.object(0, nil, node{
		"name": named(`^[A-Za-z0-9][A-Za-z0-9._+~-]{0,127}$`), "version": named(`^[A-Za-z0-9][A-Za-z0-9._+~-]{0,127}$`),
		"created":  word(`^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$`),
		"src":      text(""),
		"checksum": text(`^([0-9a-fA-F]{32}|[0-9a-fA-F]{40}|[0-9a-fA-F]{64}|[0-9a-fA-F]{128})?$`),
		"size":     object,
		"index": s.object(1, []string{"url", "size", "sha256"},
			node{"url": text("^[^/]"), "size": object, "sha256": digest}),
		"deltas": s.list(delta), "dest": word(`^(/.+)?$`),
		"dest_mode":     node{"anyOf": []node{{"type": "integer", "minimum": 1}, word(`^(0o?)?[0-7]+$`)}},
		"sync_strategy": oneOf("", "rsync", "mv", "release"), "excludes": s.list(text("")), "exclude_from": text(""),
		"owner": named(`^([A-Za-z0-9_][A-Za-z0-9_.-]{0,63})?(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})?$`),
		"keep":  number(1, 1000), "shared": s.list(text(`^[^/]`)), "symlinks": oneOf("inside", "any"), "immutable": truth,
		"commands": s.object(2, nil, node{
			"env": node{"type": "object", "additionalProperties": orNull(text("")),
				"propertyNames": node{"pattern": `^[A-Za-z_][A-Za-z0-9_]{0,127}$`}},
			"timeout": lasting, "pre": commands, "post": commands, "success": commands, "failure": commands,
		}),
		"secrets": node{"type": "object", "propertyNames": node{"pattern": `^[A-Za-z_][A-Za-z0-9_]{0,127}$`},
			"additionalProperties": word(`^(file:/[^/]|credential:[^/]|ssm:.|secretsmanager:.|vault:.+#.)`)},
		"health": s.object(4, nil, node{
			"timeout": lasting, "stable_for": duration, "every": lasting, "failures": number(1, 1000), "checks": s.list(check),
		}),
		"drain": duration,
	})
	m["$defs"] = node{"commands": s.list(node{"anyOf": []node{text(""), command}})}
	m["patternProperties"] = node{"^x-": true} // where people put what they give an anchor
	m["dependentSchemas"] = node{"shared": node{"anyOf": []node{
		{"properties": node{"shared": node{"type": "null"}}},
		{"properties": node{"shared": node{"type": "array", "maxItems": 0}}},
		{"required": []string{"sync_strategy"}, "properties": node{"sync_strategy": node{"const": "release"}}},
	}}}
	m["dependentRequired"] = node{"index": []string{"src"}}
	return m
}

func agentSchema(t *testing.T) node {
	s := newTyped(t, "agent.yaml", true)
	fields := node{}
	for _, f := range agentFieldTypes() {
		switch f.kind {
		case "words":
			fields[f.name] = s.list(text(""))
		case "unitPatterns":
			const one = `(\*|[A-Za-z0-9][A-Za-z0-9._-]*)(/(\*|[A-Za-z0-9][A-Za-z0-9._-]*)){2}`
			fields[f.name] = node{"anyOf": []node{
				{"enum": []any{true, false, "true", "false", 0, 1}},
				word(`^[ ,]*` + one + `([ ,]+` + one + `)*[ ,]*$`),
				{"type": "array", "items": word(`^` + one + `$`)},
			}}
		case "mirrorLists":
			lists := s.list(text(""))["anyOf"].([]node)
			fields[f.name] = node{"type": "object", "additionalProperties": node{"anyOf": append(lists, node{"type": "null"})}}
		case "bool":
			fields[f.name] = node{"type": "boolean"}
		case "duration":
			fields[f.name] = duration
		case "string":
			fields[f.name] = text("")
		default:
			panic(fmt.Sprintf("%s is a %s", f.name, f.kind))
		}
	}
	file := s.object(0, nil, fields)
	file["type"] = []string{"object", "null"} // one with comments alone
	return file
}
