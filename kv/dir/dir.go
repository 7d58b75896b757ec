// Package dir implements kv's contract by a watched directory.
package dir

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"kedge/kv"
	"kedge/kv/internal/backend"
)

// Store is a kv.Store in a directory, for the processes of one machine. A key's value is a plain file of that
// path, so that people can read and write it with any tool:
//
//	DIR/pins/prod/web/app         the key pins/prod/web/app
//	DIR/pins/prod/web/app@/web-1  the key pins/prod/web/app/web-1; app may be a file, too
//	DIR/.kedge/lock               flock'ed, exclusively by a commit and shared by readers, who see no half commit
//	DIR/.kedge/journal            a commit of several keys that is decided but may not be in place yet
//	DIR/.kedge/sessions/ID        flock'ed as long as the process that made it lives
//	DIR/.kedge/held/KEY           the session that holds a key, with @ for /
//
// A folder key (see package kv) is a directory. While DIR exists, a key without a file is certainly absent. Temporary
// files of editors, hidden files and symbolic links are ignored.
type Store struct {
	dir string
	log *slog.Logger
	// notifier serves all watches.
	notifier *notifier
	// step is called before each irreversible step. Tests kill the process there.
	step func(name string)
}

const (
	metaDir     = ".kedge"
	lockFile    = metaDir + "/lock"
	journalFile = metaDir + "/journal"
	sessionsDir = metaDir + "/sessions"
	heldDir     = metaDir + "/held"
	tempDir     = metaDir + "/tmp"

	maxFileValue = 512 << 10 // Consul's bound for a value
)

// Open opens the store in a directory, and creates it if it is missing. A nil log discards.
func Open(dir string, log *slog.Logger) (*Store, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	d := &Store{dir: filepath.Clean(dir), log: log, step: func(string) {}}
	d.notifier = &notifier{log: log, ignored: d.ignoredEvent}
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return nil, fmt.Errorf("open the store's directory: %w", err)
	}
	if err := d.makeMeta(); err != nil {
		return nil, fmt.Errorf("open the store's directory: %w", err)
	}
	return d, nil
}

func (d *Store) path(name string) string { return filepath.Join(d.dir, filepath.FromSlash(name)) }

func (d *Store) makeMeta() error {
	for _, name := range []string{metaDir, sessionsDir, heldDir, tempDir} {
		if isDir(d.path(name)) {
			continue
		}
		if err := os.Mkdir(d.path(name), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

func (d *Store) String() string { return "directory " + d.dir }

func (d *Store) Close() error { return nil }

func (d *Store) Get(ctx context.Context, key string) (kv.Entry, error) {
	if err := backend.CheckKey(key); err != nil {
		return kv.Entry{}, err
	}
	var entry kv.Entry
	err := d.withReadLock(ctx, func() error {
		path, ok := d.find(key)
		if !ok {
			return kv.ErrNotFound
		}
		f, err := readValue(path)
		if errors.Is(err, fs.ErrNotExist) {
			return kv.ErrNotFound // removed by hand
		}
		if err != nil {
			return err
		}
		entry = kv.Entry{Key: key, Value: f.value, Version: f.version}
		entry.Session, err = d.holder(key)
		return err
	})
	if err != nil {
		return kv.Entry{}, fmt.Errorf("get %s: %w", key, err)
	}
	return entry, nil
}

func (d *Store) List(ctx context.Context, prefix string) ([]kv.Entry, error) {
	if err := backend.CheckPrefix(prefix); err != nil {
		return nil, err
	}
	s, err := d.scan(ctx, prefix, nil)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", prefix, err)
	}
	return s.entries, nil
}

func (d *Store) EnsureFolders(ctx context.Context, prefixes ...string) error {
	for _, prefix := range prefixes {
		if err := backend.CheckPrefix(prefix); err != nil {
			return err
		}
		if prefix == "" {
			continue // DIR itself
		}
		err := d.withWriteLock(ctx, func() (err error) {
			dir, parts := d.dir, strings.Split(strings.TrimSuffix(prefix, "/"), "/")
			for i := range parts {
				if dir, err = d.ensureDir(dir, parts[:i+1]); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("create the folder %s: %w", prefix, err)
		}
	}
	return nil
}

// scanned is the result of scan.
type scanned struct {
	entries  []kv.Entry
	unsteady bool // a file is empty and so new that somebody may be writing it
}

// steadyAfter is how old an empty file must be before a watch takes it for a value. `echo x > FILE` first creates it
// empty, and may be slow on a busy machine.
const steadyAfter = 500 * time.Millisecond

// scan reads every key below prefix, while no commit runs. A missing folder has no keys. If visit
// is not nil, scan calls visit with each directory that it reads, DIR included, before it reads that
// directory.
func (d *Store) scan(ctx context.Context, prefix string, visit func(dir string)) (scanned, error) {
	var s scanned
	err := d.withReadLock(ctx, func() error {
		s = scanned{}
		seen := map[string]bool{}
		limit := backend.NewListLimit(prefix)
		var walk func(dir, key string) error
		walk = func(dir, key string) error {
			if visit != nil {
				visit(dir)
			}
			files, err := os.ReadDir(dir)
			if errors.Is(err, fs.ErrNotExist) && dir != d.dir {
				return nil
			}
			if err != nil {
				return err
			}
			for _, f := range files {
				path, name := filepath.Join(dir, f.Name()), f.Name()
				if f.IsDir() {
					below := key + strings.TrimSuffix(name, "@") + "/"
					if !ignoredFile(strings.TrimSuffix(name, "@")) &&
						(strings.HasPrefix(below, prefix) || strings.HasPrefix(prefix, below)) {
						if err := walk(path, below); err != nil {
							return err
						}
					}
					continue
				}
				if !f.Type().IsRegular() || ignoredFile(name) || !strings.HasPrefix(key+name, prefix) || seen[key+name] {
					continue
				}
				v, err := readValue(path)
				if errors.Is(err, fs.ErrNotExist) {
					continue // removed by hand
				}
				if err != nil {
					return err
				}
				seen[key+name] = true
				if age := time.Since(v.modTime); len(v.value) == 0 && age >= 0 && age < steadyAfter {
					s.unsteady = true
				}
				e := kv.Entry{Key: key + name, Value: v.value, Version: v.version}
				if err := limit.Add(e); err != nil {
					return err
				}
				s.entries = append(s.entries, e)
			}
			return nil
		}
		if err := walk(d.dir, ""); err != nil {
			return err
		}
		held, err := os.ReadDir(d.path(heldDir))
		if err != nil {
			return err
		}
		holders := map[string]bool{}
		for _, h := range held {
			holders[h.Name()] = true
		}
		for i, e := range s.entries {
			if holders[heldName(e.Key)] {
				if s.entries[i].Session, err = d.holder(e.Key); err != nil {
					return err
				}
			}
		}
		backend.SortEntries(s.entries)
		return nil
	})
	return s, err
}
