package deploy

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"kedge/artifact"
	"kedge/deployments"
)

// appTree is an application's tree as its own tools make it.
type appTree struct {
	// build is a shell script that makes version $V in the working directory.
	build  string
	needs  string // the program that build takes; the case is left out with -short
	shared []string
	links  deployments.Symlinks
	// plain has it published as tar makes it, without an index.
	plain    bool
	strategy deployments.Strategy // by default release
	// works is a shell script that runs the application from $DEST, and prints its version.
	works string
}

var appTrees = map[string]appTree{
	"virtualenv": {
		needs: "python3", links: deployments.SymlinksAny, works: "$DEST/bin/python -c 'import app; print(app.version)'",
		build: `python3 -m venv --without-pip .
			echo "version = '$V'" > "$(echo lib/python3*/site-packages)/app.py"`,
	},
	"npm workspaces": {
		needs: "npm", works: "node $DEST/packages/web/main.js",
		build: `mkdir -p packages/web packages/lib
			echo '{"name": "shop", "private": true, "workspaces": ["packages/*"]}' > package.json
			echo '{"name": "@shop/lib", "version": "1.0.0", "bin": {"shop": "shop.js"}}' > packages/lib/package.json
			printf '#!/usr/bin/env node\n' > packages/lib/shop.js
			echo "module.exports = '$V'" > packages/lib/index.js
			echo '{"name": "@shop/web", "version": "1.0.0", "dependencies": {"@shop/lib": "*"}}' > packages/web/package.json
			echo "console.log(require('@shop/lib'))" > packages/web/main.js
			npm install --offline --no-audit --no-fund --cache "$PWD.cache" > /dev/null
			test -L node_modules/@shop/lib`,
	},
	"Rails": {
		shared: []string{"log", "tmp/pids", "public/uploads"}, works: "cat $DEST/config/version",
		build: `mkdir -p app/models config log tmp/pids tmp/cache public/assets vendor/bundle/bin bin
			echo $V > config/version; touch log/.keep tmp/pids/.keep tmp/cache/.keep
			printf '#!/bin/sh\nexec true\n' > bin/rails; chmod 755 bin/rails; ln -s ../../../bin/rails vendor/bundle/bin/rails
			chmod 1777 tmp; echo "class A; end # $V" > app/models/a.rb
			head -c 300000 /dev/zero | tr '\0' x > public/assets/app-$V.js; ln -s app-$V.js public/assets/app.js`,
	},
	"Go program": {
		needs: "go", works: "$DEST/bin/app",
		build: `printf 'module app\n' > go.mod
			printf 'package main\nfunc main() { println("%s") }\n' $V > main.go
			mkdir bin; GOFLAGS= CGO_ENABLED=0 go build -o bin/app . && rm go.mod main.go`,
	},
	"PHP": {
		works: "cat $DEST/public/version.php",
		build: `mkdir -p public src vendor/composer vendor/bin vendor/acme/lib/bin var/cache
			echo $V > public/version.php; echo '<?php // autoload' > vendor/autoload.php
			printf '#!/usr/bin/env php\n' > vendor/acme/lib/bin/acme; chmod 755 vendor/acme/lib/bin/acme
			ln -s ../acme/lib/bin/acme vendor/bin/acme; chmod 775 var var/cache
			for i in $(seq 300); do echo "<?php class C$i {}" > src/C$i.php; done; chmod 600 src/C1.php`,
	},
	"odd files":              {build: oddFiles, works: "cat $DEST/version"},
	"odd files in a tar":     {build: oddFiles, works: "cat $DEST/version", plain: true},
	"odd files by rsync":     {build: oddFiles, works: "cat $DEST/version", strategy: deployments.StrategyRsync},
	"odd files in a tar, mv": {build: oddFiles, works: "cat $DEST/version", strategy: deployments.StrategyMv, plain: true},
}

// oddFiles are sparse, in directories that give on their group or bound who removes, and otherwise rare.
const oddFiles = `echo $V > version; truncate -s 3M sparse; printf $V >> sparse; ` +
	`mkdir -m 1777 sticky; mkdir -m 700 private
	mkdir -m 555 closed empty; : > none; printf x > 'a b'; printf x > ümläut; ln version hard; ln -s none dangling
	chmod 444 none; mkdir -p "$(printf 'd%.0s' $(seq 200))/$(printf 'e%.0s' $(seq 200))"
	mkdir team team/below team/closed; chmod 755 team/below; echo $V > team/file
	chmod g-s team/*; chmod 2775 team; chmod 3770 team/closed`

// Trees of every kind that people deploy are published, deployed, updated by a delta, gone back from, healed and
// pruned; each time what is live is what its tools made, and works.
func TestRealTrees(t *testing.T) {
	t.Parallel()
	for name, tree := range appTrees {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if tree.needs != "" {
				if testing.Short() {
					t.Skip("needs " + tree.needs + ": left out with -short")
				}
				if _, err := exec.LookPath(tree.needs); err != nil {
					t.Fatal(err)
				}
			}
			w := newWorld(t)
			u := w.open(nil)
			one := w.publishTree(tree, "1", nil)
			two := w.publishTree(tree, "2", nil, one)
			bad := w.publishTree(tree, "3", fails, two)
			w.deploy(u, one)
			w.wantTree(u, tree, "1")
			for _, s := range tree.shared { // what the application writes there is in none of the releases
				if err := os.WriteFile(filepath.Join(w.dest(), s, "of the application"), []byte("x"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			w.deploy(u, two)
			w.wantTree(u, tree, "2")
			w.wantFailed(u, bad, two)
			w.wantTree(u, tree, "2")
			w.deploy(u, one)
			w.wantTree(u, tree, "1")

			if tree.strategy == deployments.StrategyMv {
				return // nothing is verified, healed or kept of it
			}
			w.damage()
			if ds, err := u.Verify(t.Context(), 0); err != nil || len(ds) < 3 {
				t.Errorf("the damage was not seen: %v, %v", ds, err)
			}
			if _, err := u.Heal(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.wantTree(u, tree, "1")
			for _, s := range tree.shared {
				if _, err := os.Stat(filepath.Join(w.dest(), s, "of the application")); err != nil {
					t.Errorf("what is shared was lost: %v", err)
				}
			}
			w.deploy(u, two)
			w.wantTree(u, tree, "2")
			if tree.strategy != "" {
				return // no release is kept
			}
			if kept, err := filepath.Glob(w.dest() + ".releases/[0-9]*"); err != nil || len(kept) != 2 {
				t.Errorf("kept %q, %v, want what runs and one more", kept, err)
			}
		})
	}
}

// publishTree builds and publishes a version of a tree, with a delta from since.
func (w *world) publishTree(
	tree appTree,
	version string,
	change func(*deployments.Manifest),
	since ...deployments.Pointer,
) deployments.Pointer {
	w.t.Helper()
	dir := w.path("built", version)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		w.t.Fatal(err)
	}
	w.shell(dir, "V="+version, tree.build)
	m := deployments.Manifest{
		Name: "app", Version: version, Dest: w.dest(), DestMode: 0o755,
		Strategy: cmp.Or(tree.strategy, deployments.StrategyRelease), Keep: 1, Shared: tree.shared, Symlinks: tree.links,
	}
	if change != nil {
		change(&m)
	}
	if tree.plain {
		w.shell(dir, "", `tar --sparse -cf "../../objects/tree-`+version+`.tar" .`)
		data, err := os.ReadFile(w.path("objects", "tree-"+version+".tar"))
		if err != nil {
			w.t.Fatal(err)
		}
		return w.publish(version, func(to *deployments.Manifest) {
			to.Src, to.Checksum = "file://"+w.path("objects", "tree-"+version+".tar"), fmt.Sprintf("%x", sha256.Sum256(data))
			to.Strategy, to.Commands.Post = m.Strategy, m.Commands.Post
			if to.Strategy == deployments.StrategyMv {
				to.Commands.Pre = []deployments.Command{{Run: `rm -rf "$KEDGE_DEST".old; ! test -e "$KEDGE_DEST" ||
					mv "$KEDGE_DEST" "$KEDGE_DEST".old`}}
			}
		})
	}
	published, err := artifact.Publish(w.t.Context(), w.config().Objects, artifact.PublishOptions{
		Dir: dir, To: "file://" + w.path("objects"), Manifest: m, Since: since,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return published.Pointer
}

// wantTree wants dest to be as the tree's tools made it, to have no drift, and to work.
func (w *world) wantTree(u *Unit, tree appTree, version string) {
	w.t.Helper()
	want, got := w.describe(w.path("built", version), tree.shared), w.describe(w.dest(), tree.shared)
	for _, line := range want {
		if !slices.Contains(got, line) {
			w.t.Errorf("version %s lacks %s", version, line)
		}
	}
	for _, line := range got {
		if !slices.Contains(want, line) {
			w.t.Errorf("version %s has %s besides", version, line)
		}
	}
	if ds, err := u.Verify(w.t.Context(), 0); err != nil || len(ds) > 0 {
		w.t.Errorf("drift: %v, %v", ds, err)
	}
	if said := strings.TrimSpace(w.shell(w.root, "DEST="+w.dest(), tree.works)); said != version {
		w.t.Errorf("it says %q, want %q", said, version)
	}
}

// describe lists a tree by type, mode, path, and content or target, but for what is shared, and where it lies.
func (w *world) describe(dir string, shared []string) (lines []string) {
	w.t.Helper()
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		w.t.Fatal(err)
	}
	err = filepath.WalkDir(real, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(real, path)
		info, err := d.Info()
		if err != nil || rel == "." {
			return err
		}
		if slices.Contains(shared, rel) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		line := fmt.Sprintf("%v %q", info.Mode(), rel)
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %x", sha256.Sum256(data))
		case info.Mode()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " -> " + to
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return lines
}

// damage changes what is live: a file's content, another's mode; and adds one, and removes one.
func (w *world) damage() {
	w.t.Helper()
	var files []string
	err := filepath.WalkDir(w.dest()+"/", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			files = append(files, path)
		}
		return err
	})
	if err != nil || len(files) == 0 {
		w.t.Fatalf("%d files, %v", len(files), err)
	}
	first, last := files[0], files[len(files)-1]
	err = errors.Join(os.Chmod(last, 0o707), os.WriteFile(filepath.Join(w.dest(), "new"), nil, 0o644))
	if err == nil {
		err = os.WriteFile(first, []byte("damaged"), 0o644)
	}
	if middle := files[len(files)/2]; err == nil && middle != first && middle != last {
		err = os.Remove(middle)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// shell runs a script in dir, and returns what it prints.
func (w *world) shell(dir, env, script string) string {
	w.t.Helper()
	cmd := exec.Command("sh", "-euc", script)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil {
		w.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}
