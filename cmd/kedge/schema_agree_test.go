package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/goccy/go-yaml"

	"kedge/deployments"
)

type agentFieldType struct{ name, kind string }

// agentFieldTypes are the fields of agent.yaml.
func agentFieldTypes() (all []agentFieldType) {
	for _, f := range reflect.VisibleFields(reflect.TypeFor[agentConfig]()) {
		kind := f.Type.Name()
		if f.Type == reflect.TypeFor[time.Duration]() {
			kind = "duration"
		}
		all = append(all, agentFieldType{f.Tag.Get("yaml"), kind})
	}
	return all
}

const (
	someDigest  = "9f2c4b1e8a7d3f605142c7b9e0d8a6f3154c2e7b9a0d8f6e3c1b5a4972d0e8f1"
	somePointer = "s3://acme-releases/app/1.4.2/manifest.yaml@sha256:" + someDigest
)

// typedExamples have every field that people may type.
var typedExamples = map[string][]string{
	"unit": {`
release: ` + somePointer + `
after: [base]
rollout: {canary: 1, bake: 5m, max_unavailable: 10%, max_failures: 0, on_failure: pause, approval: manual,
  deadline: 9m, fast_back: false}
drift: heal
adopt: true
`},
	"kedge.yaml": {`
sources: {prod: [s3://acme-releases/web], "*": [s3://acme-releases]}
dests: {prod: [/srv]}
users: {prod: [app, deploy]}
commands: {"*": true}
prune: true
max_removed: 30
allow_rewind: false
rollout: {canary: 10%, bake: 5m, max_unavailable: 2, max_failures: 1, on_failure: rollback, approval: auto,
  deadline: 1h, fast_back: true}
drift: report
freeze:
  - {name: weekend, deny: 0 16 * * fri, duration: 64h, zone: Europe/Berlin, units: [prod/*/*],
     running: finish, reason: nobody is here}
  - {allow: 0 8 * * mon-fri, duration: 9h}
`},
	"manifest": {`
name: app
version: 1.4.2
created: 2026-11-24T09:00:00Z
src: app.tar.zst
checksum: 9f2c4b1e8a7d3f605142c7b9e0d8a6f3154c2e7b9a0d8f6e3c1b5a4972d0e8f1
size: 4711
index: {url: index, size: 99, sha256: ` + someDigest + `}
deltas:
  - {url: delta, size: 99, sha256: ` + someDigest + `, from: ` + someDigest + `}
dest: /srv/app
dest_mode: "0755"
sync_strategy: release
owner: app:www
keep: 3
shared: [log]
symlinks: inside
immutable: true
commands:
  env: {RAILS_ENV: production}
  timeout: 2m
  pre: [bin/migrate]
  post: [{run: systemctl restart app, timeout: 2m, user: app, once: true}]
  success: [true]
  failure: [logger failed]
secrets: {DB_URL: ssm:/prod/db}
health:
  timeout: 1m
  stable_for: 10s
  every: 10s
  failures: 3
  checks:
    - {http: {url: http://127.0.0.1/up, status: 200, contains: ok}, interval: 1s, timeout: 5s, during: deploy}
    - {http: http://127.0.0.1/up}
    - {tcp: 127.0.0.1:80}
    - {exec: test -e /srv, user: app}
    - {systemd: app.service}
    - {consul: app}
drain: 5s
`, `
src: https://releases.example.com/app.tar.gz
checksum: 9f2c4b1e8a7d3f605142c7b9e0d8a6f3
dest: /srv/app
excludes: ["*.log"]
exclude_from: .rsyncignore
`},
	"agent.yaml": {`
stage: prod
roles: [web, db]
node: web-1
state_dir: /var/lib/kedge
listen: :7070
listen_status: 10.0.0.7:7071
sources: [s3://acme-releases]
local_sources: false
mirrors: {"s3://acme-releases/": ["s3://acme-releases-euw1/", "http://127.0.0.1:65001/acme/"]}
dests: [/srv]
users: [app]
secrets: [ssm:/prod]
no_commands: false
signers: /etc/kedge/signers
allow_older_pins: false
allow_empty: false
observe: false
adopt: false
maintenance: false
snapshot: s3://acme/snapshot
snapshot_signers: /etc/kedge/snapshot
snapshot_max_age: 72h
ec2: false
lifecycle_hook: launch
lifecycle_timeout: 15m
autoscaling_group: web
max_bandwidth: 50MB/s
start_delay: 5s
verify_every: 24h
verify: always
ready_timeout: 15m
`, `
observe: [prod/web/app, "*/db/*"]
`, `
observe: prod/web/app, */db/*
`},
}

// typedParsers are how kedge reads them.
var typedParsers = map[string]func([]byte) error{
	"unit": func(data []byte) error {
		base := []byte("release: " + somePointer)
		return load(fstest.MapFS{"prod/web/app.yaml": {Data: data}, "prod/web/base.yaml": {Data: base}})
	},
	"kedge.yaml": func(data []byte) error { return load(fstest.MapFS{deployments.SettingsFile: {Data: data}}) },
	"manifest": func(data []byte) error {
		_, err := deployments.ParseManifest(data, "s3://acme-releases/app/1.4.2/manifest.yaml", nil)
		return err
	},
	"agent.yaml": func(data []byte) error { return decodeAgentConfig("agent.yaml", data, new(agentConfig), origins{}) },
}

func load(tree fstest.MapFS) error {
	_, err := deployments.Load(tree)
	return err
}

// What a parser takes its schema takes; what a parser refuses for its shape (an unknown field, a value of another kind,
// a word that isn't one of those allowed) its schema refuses. Tried by putting other values in place of each value.
func TestSchemasAgreeWithParsers(t *testing.T) {
	t.Parallel()
	// What is wrong for its meaning, not for its shape, a schema can't know.
	meaning := map[string][]string{
		"unit": {"after", "release"},
		"kedge.yaml": {"sources/", "dests/", "freeze/0/deny", "freeze/1/allow", "freeze/0/zone", "freeze/0/units",
			"max_removed"},
		"manifest": {"src", "checksum", "index", "shared", "excludes", "dest", "dest_mode", "owner", "deltas/0/url"},
	}
	for kind, examples := range typedExamples {
		t.Run(kind, func(t *testing.T) {
			schema, parse := compileSchema(t, kind), typedParsers[kind]
			normal := func(v any) (data []byte, decoded any) {
				data, err := json.Marshal(v)
				if err == nil {
					err = json.Unmarshal(data, &decoded)
				}
				if err != nil {
					t.Fatal(err)
				}
				return data, decoded
			}
			tried, refused, lenient := 0, 0, 0
			compare := func(path string, v any) {
				data, decoded := normal(v)
				parsed, valid := parse(data), schema.Validate(decoded)
				tried++
				if parsed != nil {
					refused++
				}
				known := slices.ContainsFunc(meaning[kind], func(p string) bool { return strings.HasPrefix(path, p) })
				switch {
				case parsed == nil && valid != nil:
					t.Errorf("%s: the parser takes it, the schema doesn't: %v\n%s", path, valid, data)
				case parsed != nil && valid == nil && !known:
					t.Errorf("%s: the schema takes what the parser refuses: %v\n%s", path, parsed, data)
				case parsed != nil && valid == nil:
					lenient++
				}
			}
			var has []string
			for _, example := range examples {
				var document any
				if err := errors.Join(parse([]byte(example)), yaml.Unmarshal([]byte(example), &document)); err != nil {
					t.Fatalf("the example: %v", err)
				}
				_, document = normal(document)
				has = append(has, fieldNames(document)...)
				compare("", document)
				mutate(document, compare)
			}
			if missing := without(schemaFields(t, kind), has); len(missing) > 0 {
				t.Errorf("the examples have no %q", missing)
			}
			t.Logf("%d documents, %d refused by the parser, %d of these by it alone", tried, refused, lenient)
			if refused < tried/3 {
				t.Errorf("only %d of %d are refused", refused, tried)
			}
		})
	}
}

// mutate calls try with document, again and again, with one value each time replaced, left out or added.
func mutate(document any, try func(string, any)) {
	others := []any{"x", "", 7, 0, -1, 1.5, true, "true", []any{}, []any{"x"}, map[string]any{}, map[string]any{"x": 1},
		nil, "5m", "10%", "/srv/x", "s3://b/x", "report", "none"}
	whole := []any{document}
	var walk func(v any, path string, put func(any))
	walk = func(v any, path string, put func(any)) {
		for _, other := range others {
			put(other)
			try(strings.TrimPrefix(path, "/"), whole[0])
		}
		put(v)
		switch v := v.(type) {
		case map[string]any:
			for key := range maps.Clone(v) {
				was := v[key]
				delete(v, key)
				try(strings.TrimPrefix(path+"/"+key, "/"), whole[0])
				v[key] = was
				walk(was, path+"/"+key, func(other any) { v[key] = other })
			}
			v["unknown_field"] = "x"
			try(strings.TrimPrefix(path+"/unknown_field", "/"), whole[0])
			delete(v, "unknown_field")
		case []any:
			for i := range v {
				walk(v[i], fmt.Sprintf("%s/%d", path, i), func(other any) { v[i] = other })
			}
		}
	}
	walk(document, "", func(other any) { whole[0] = other })
}

// fieldNames are the names of all fields in a document.
func fieldNames(v any) (names []string) {
	switch v := v.(type) {
	case map[string]any:
		for name, value := range v {
			names = append(append(names, name), fieldNames(value)...)
		}
	case []any:
		for _, value := range v {
			names = append(names, fieldNames(value)...)
		}
	}
	return names
}

// schemaFields are the names of all fields that a schema has.
func schemaFields(t *testing.T, kind string) []string {
	t.Helper()
	text, _ := deployments.Schema(kind)
	var schema any
	if err := json.Unmarshal(text, &schema); err != nil {
		t.Fatal(err)
	}
	var names []string
	var walk func(any)
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			for key, value := range v {
				if fields, ok := value.(map[string]any); ok && key == "properties" {
					names = slices.AppendSeq(names, maps.Keys(fields))
				}
				walk(value)
			}
		case []any:
			for _, value := range v {
				walk(value)
			}
		}
	}
	walk(schema)
	return names
}

func without(names, those []string) []string {
	return slices.DeleteFunc(names, func(name string) bool { return slices.Contains(those, name) })
}

// The example repo, the configuration that packages install, and the manifests of the tests are as the schemas say.
func TestSchemasTakeExamples(t *testing.T) {
	t.Parallel()
	for pattern, kind := range map[string]string{
		"../../deployments/example/repo/kedge.yaml": "kedge.yaml",
		"../../deployments/example/repo/*/*/*.yaml": "unit",
		"../../deployments/example/releases/*.yaml": "manifest",
		"../../deployments/example/agent.yaml":      "agent.yaml",
		"../../deployments/etc/agent.yaml":          "agent.yaml",
	} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Errorf("%s: %v", pattern, err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var document any
			if err := yaml.Unmarshal(data, &document); err != nil {
				t.Fatal(err)
			}
			text, _ := json.Marshal(document)
			if json.Unmarshal(text, &document); compileSchema(t, kind).Validate(document) != nil {
				t.Errorf("%s: %v", file, compileSchema(t, kind).Validate(document))
			}
		}
	}
}
