package fleet

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/mirror"
)

var update = flag.Bool("update", false, "write the golden files anew")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got\n%s\nwant\n%s", name, got, want)
	}
}

func TestTable(t *testing.T) {
	t.Parallel()
	f := Assemble(busyFleet(), noon)
	rolling := Assemble([]kv.Entry{
		put(kv.DesiredKey(app), deployments.Record{Target: release("app", "1.4.2"), Stable: release("app", "1.4.1"), Generation: 2,
			Rollout: &deployments.Progress{Phase: deployments.PhaseHalted, Since: noon, Reason: "1 of 3 nodes failed, 0 are allowed", Bad: release("app", "1.4.2").Digest}}),
	}, noon)
	for name, c := range map[string]struct {
		f   *Fleet
		opt TableOptions
	}{
		"pipe.txt":    {f, TableOptions{}},
		"80.txt":      {f, TableOptions{Width: 80}},
		"nodes.txt":   {f, TableOptions{Width: 100, Nodes: true}},
		"color.txt":   {f, TableOptions{Width: 80, Color: true}},
		"halted.txt":  {rolling, TableOptions{Width: 80}},
		"nothing.txt": {Assemble(nil, noon), TableOptions{Width: 80}},
		"narrow.txt":  {f, TableOptions{Width: 60}},
	} {
		var out bytes.Buffer
		if err := WriteTable(&out, c.f, c.opt); err != nil {
			t.Fatal(err)
		}
		golden(t, name, out.Bytes())
		for line := range strings.Lines(out.String()) {
			if line = strings.TrimSuffix(line, "\n"); c.opt.Width > 0 && width(line) > c.opt.Width {
				t.Errorf("%s: a line of %d columns: %q", name, width(line), line)
			}
			if strings.TrimRight(line, " ") != line {
				t.Errorf("%s: a line ends in blanks: %q", name, line)
			}
			if !c.opt.Color && strings.ContainsRune(line, '\x1b') {
				t.Errorf("%s: colours that nobody asked for: %q", name, line)
			}
		}
	}
}

// What others wrote must not reach the terminal as commands.
func TestTableIsClean(t *testing.T) {
	t.Parallel()
	evil := runs("app", "1\x1b[2J\x1b]0;owned\a")
	evil.State, evil.Error = deployments.StateRetrying, "no\r\n\x1b[31msuch\u202eobject"
	f := Assemble([]kv.Entry{
		put(kv.MirrorKey, mirror.Status{Head: "\x1b[2Jabcdef0", Author: "\x1b[2J", Error: "\x1b[2J"}),
		put(kv.DesiredKey(app), deployments.Record{Target: release("app", "1"), Generation: 1}),
		put("pins/prod/web/app/web-1", "{release: hold, by: \"\\e[2J\", reason: \"\\e[2J\"}"),
		put("pins/prod/web/\x1b[2J", "hold"),
		says("web-1", map[string]deployments.UnitReport{"app": evil}),
	}, noon)
	var out bytes.Buffer
	if err := WriteTable(&out, f, TableOptions{Nodes: true}); err != nil {
		t.Fatal(err)
	}
	if d, err := Explain(f, app, "web-1"); err != nil {
		t.Error(err)
	} else if err := WriteExplain(&out, f, app, "web-1", d, TableOptions{}); err != nil {
		t.Error(err)
	}
	if s := out.String(); strings.ContainsAny(s, "\x1b\a\r\u202e") {
		t.Errorf("%q", s)
	}
}

func TestExplain(t *testing.T) {
	t.Parallel()
	f := Assemble(busyFleet(), noon)
	for name, c := range map[string]struct {
		id   deployments.UnitID
		node string
		opt  TableOptions
	}{
		"explain-target.txt":     {app, "web-1", TableOptions{Width: 80}},
		"explain-quarantine.txt": {app, "web-3", TableOptions{Width: 80}},
		"explain-node-pin.txt":   {app, "web-4", TableOptions{}},
		"explain-gone.txt":       {app, "web-9", TableOptions{Width: 80}},
		"explain-hold.txt":       {deployments.UnitID{Stage: "prod", Role: "web", Unit: "base"}, "web-2", TableOptions{Width: 80}},
		"explain-invalid.txt":    {deployments.UnitID{Stage: "prod", Role: "web", Unit: "worker"}, "web-2", TableOptions{Width: 80}},
	} {
		d, err := Explain(f, c.id, c.node)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var out bytes.Buffer
		if err := WriteExplain(&out, f, c.id, c.node, d, c.opt); err != nil {
			t.Fatal(err)
		}
		golden(t, name, out.Bytes())
	}
	for _, c := range []struct{ unit, node, says string }{
		{"prod/web/nosuch", "web-1", "no unit prod/web/nosuch"},
		{"prod/web/app", "web-77", "there are web-1, web-2, web-3, web-4, web-9"},
		{"staging/web/app", "web-1", "no node of staging/web has ever reported"},
	} {
		id, _ := deployments.ParseUnitID(c.unit)
		if _, err := Explain(f, id, c.node); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("explain %s %s: %v, want %q", c.unit, c.node, err, c.says)
		}
	}
}

func TestHistoryTable(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	err := WriteHistory(&out, []mirror.History{
		{Generation: 3, Release: release("app", "1.4.1"), Commit: "9d8e7f6a5b4c3d2e", Author: "Bob <bob@example.com>", Subject: "Back to 1.4.1, which worked, unlike the newer one that did not", At: noon, Note: "a change by hand was put back"},
		{Generation: 2, Release: release("app", "1.4.2"), Commit: "4f2c91ab77d0c0ff", Author: "Alice <alice@example.com>", Subject: "1.4.2", At: noon.Add(-26 * time.Hour)},
		{Generation: 1, Note: "does not parse: unexpected end of JSON input"},
	}, TableOptions{Width: 100})
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "history.txt", out.Bytes())
}
