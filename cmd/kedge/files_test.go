package main

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"kedge/sync/git/gittest"
)

// Whatever a setting names in place of a file, a command says so at once, with the setting and the name: it neither
// waits for a pipe's writer nor reads a device without end.
func TestSettingsThatNameNoFile(t *testing.T) {
	dir := t.TempDir()
	pipe, large := filepath.Join(dir, "pipe"), filepath.Join(dir, "large")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(large, bytes.Repeat([]byte("#"), 5<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	store, repo := "--kv=file://"+filepath.Join(dir, "kv"), gittest.New(t).Work
	agent := []string{"agent", store, "--stage=prod", "--roles=web", "--node=n",
		"--state-dir=" + filepath.Join(dir, "state")}
	mirror := []string{"mirror", store, repo}
	publish := []string{"publish", repo, "--to=file://" + dir, "--name=a", "--version=1", "--dest=/srv/a"}
	with := func(args []string, more ...string) []string { return append(args[:len(args):len(args)], more...) }
	for setting, args := range map[string][]string{
		"--config":                  with(agent, "--config=FILE"),
		"--signers":                 with(agent, "--signers=FILE"),
		"--snapshot-signers":        with(agent, "--snapshot=file:///x", "--snapshot-signers=FILE"),
		"run --signers":             {"run", "--signers=FILE", "file:///x"},
		"check --signers":           {"check", "--signers=FILE", repo},
		"mirror --signers":          with(mirror, "--signers=FILE"),
		"--signed-by":               with(mirror, "--signed-by=FILE"),
		"--signed-by-pgp":           with(mirror, "--signed-by-pgp=FILE"),
		"--snapshot-key":            with(mirror, "--snapshot=file:///x", "--snapshot-key=FILE"),
		"--notify":                  with(mirror, "--notify=FILE"),
		"--sign":                    with(publish, "--sign=FILE"),
		"--manifest":                with(publish, "--manifest=FILE"),
		"KEDGE_WEBHOOK_SECRET_FILE": mirror,
		"CONSUL_HTTP_TOKEN_FILE":    {"status"},
		"CONSUL_CACERT":             {"status"},
		"CONSUL_CLIENT_CERT":        {"status"},
		"CONSUL_CLIENT_KEY":         {"status"},
		"AWS_CA_BUNDLE":             {"run", "s3://bucket/x"},
		"AWS_CONFIG_FILE":           {"run", "s3://bucket/x"},
	} {
		for _, file := range []string{pipe, large, "/dev/zero"} {
			t.Run(setting+" "+filepath.Base(file), func(t *testing.T) {
				name := setting[strings.LastIndex(setting, " ")+1:]
				if !strings.HasPrefix(name, "--") {
					t.Setenv(name, file)
				}
				var given []string
				for _, arg := range args {
					given = append(given, strings.Replace(arg, "FILE", file, 1))
				}
				_, stderr, code := cli(t, "", given...)
				if code == 0 || !strings.Contains(stderr, name) || !strings.Contains(stderr, file) {
					t.Errorf("exit code %d\n%s", code, stderr)
				}
			})
		}
	}
}

// What reads a file without a bound names here why it may: kedge itself made it, or the kernel did. Whatever somebody
// else may have put there is read by inputfile, or by an object's client.
func TestFilesAreReadWithinBounds(t *testing.T) {
	t.Parallel()
	own := map[string]bool{}
	for file := range strings.FieldsSeq(`
		artifact/before.go artifact/command_changes.go artifact/release.go artifact/stats.go
		deployments/durable/durable.go deployments/durable/state.go
		kv/dir/commit.go kv/dir/lease.go kv/dir/session.go
		sync/agent/statedir/old_failures.go sync/agent/statedir/starting.go sync/agent/statedir/statedir.go
		sync/deploy/floor.go sync/git/signature.go cmd/kedge/demo/walk.go
		artifact/safefs/remove.go sync/command/leftovers.go sync/deploy/boot.go
		artifact/compare.go
		kv/dir/file.go`) {
		own[file] = true
	}
	root := filepath.Join("..", "..")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(root, path)
		if d.IsDir() {
			if strings.HasSuffix(name, "test") || name != "." && strings.HasPrefix(d.Name(), ".") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") || own[name] {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			of, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if x, ok := of.X.(*ast.Ident); ok && x.Name == "os" && (of.Sel.Name == "ReadFile" || of.Sel.Name == "Open") {
				t.Errorf("%s calls os.%s: a file that somebody names may be a pipe, or without end", name, of.Sel.Name)
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
