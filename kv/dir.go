package kv

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"kedge/deployments"
	"kedge/deployments/durable"
)

// dirStore is the Store in a directory, for the processes of one machine. A key's value is a plain file of that path, so
// that people can read and write it with what they know:
//
//	DIR/pins/prod/web/app           the key pins/prod/web/app
//	DIR/pins/prod/web/app@/web-1    the key pins/prod/web/app/web-1; see the package comment
//	DIR/.kedge/lock                 flock'ed, exclusive by a commit and shared by a reader, who so never sees half of one
//	DIR/.kedge/journal              a commit of several keys that is decided but may not be in place yet
//	DIR/.kedge/sessions/ID          flock'ed as long as the process that made it lives
//	DIR/.kedge/held/KEY             the session that holds a key, with @ for /
//
// Folders are directories. Their absence is certain as long as DIR is there. Temporary files of editors count for nothing.
type dirStore struct {
	dir string
	log *slog.Logger
	// notifier serves all watches.
	notifier *dirNotifier
	// step is called before each irreversible step; tests kill the process there.
	step func(name string)
}

const (
	metaDir     = ".kedge"
	lockFile    = metaDir + "/lock"
	journalFile = metaDir + "/journal"
	sessionsDir = metaDir + "/sessions"
	heldDir     = metaDir + "/held"
	tempDir     = metaDir + "/tmp"

	maxFileValue = 512 << 10 // what Consul takes for a value
)

func openDir(dir string, log *slog.Logger) (*dirStore, error) {
	d := &dirStore{dir: filepath.Clean(dir), log: log, step: func(string) {}}
	d.notifier = &dirNotifier{log: log, ignored: d.ignoredEvent}
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return nil, fmt.Errorf("open the store's directory: %w", err)
	}
	if err := d.makeMeta(); err != nil {
		return nil, fmt.Errorf("open the store's directory: %w", err)
	}
	return d, nil
}

func (d *dirStore) path(name string) string { return filepath.Join(d.dir, filepath.FromSlash(name)) }

func (d *dirStore) makeMeta() error {
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

func (d *dirStore) String() string { return "directory " + d.dir }

func (d *dirStore) Close() error { return nil }

func (d *dirStore) Get(ctx context.Context, key string) (Entry, error) {
	if err := checkKey(key); err != nil {
		return Entry{}, err
	}
	var entry Entry
	err := d.reading(ctx, func() error {
		path, ok := d.find(key)
		if !ok {
			return ErrNotFound
		}
		f, err := readValue(path)
		if err != nil {
			return err
		}
		entry = Entry{Key: key, Value: f.value, Version: f.version, Session: d.holder(key)}
		return nil
	})
	if err != nil {
		return Entry{}, fmt.Errorf("get %s: %w", key, err)
	}
	return entry, nil
}

func (d *dirStore) List(ctx context.Context, prefix string) ([]Entry, error) {
	if err := checkPrefix(prefix); err != nil {
		return nil, err
	}
	s, err := d.scan(ctx, prefix, nil)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", prefix, err)
	}
	return s.entries, nil
}

func (d *dirStore) EnsureFolders(ctx context.Context, prefixes ...string) error {
	for _, prefix := range prefixes {
		if err := checkPrefix(prefix); err != nil {
			return err
		}
		if prefix == "" {
			continue // DIR itself
		}
		err := d.writing(ctx, func() (err error) {
			dir, parts := d.dir, strings.Split(strings.TrimSuffix(prefix, "/"), "/")
			for i := range parts {
				if dir, err = d.enter(dir, parts[:i+1]); err != nil {
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

// scanned is what the files below a prefix say.
type scanned struct {
	entries  []Entry
	unsteady bool // a file is empty and so new that somebody may be about to write it
}

// steadyAfter is how long a new, empty file is given: `echo x > FILE` makes it empty first, and may be held up on a busy machine.
const steadyAfter = 500 * time.Millisecond

// scan reads every key below prefix at one moment. It calls visit, if there is one, with each directory before reading it.
func (d *dirStore) scan(ctx context.Context, prefix string, visit func(dir string)) (scanned, error) {
	var s scanned
	err := d.reading(ctx, func() error {
		s = scanned{}
		seen := map[string]bool{}
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
					if !ignoredFile(strings.TrimSuffix(name, "@")) && (strings.HasPrefix(below, prefix) || strings.HasPrefix(prefix, below)) {
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
				s.entries = append(s.entries, Entry{Key: key + name, Value: v.value, Version: v.version})
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
				s.entries[i].Session = d.holder(e.Key)
			}
		}
		sortEntries(s.entries)
		return nil
	})
	return s, err
}

// fileValue is one value's file.
type fileValue struct {
	value   []byte
	version uint64
	modTime time.Time
}

// readValue reads a file, at most as much as Consul would take for a value. The version is made of what the file holds and what
// the file system says about it, since people who edit it keep no count.
func readValue(path string) (fileValue, error) {
	f, err := os.Open(path)
	if err != nil {
		return fileValue{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fileValue{}, err
	}
	value, err := io.ReadAll(io.LimitReader(f, maxFileValue+1))
	if err != nil {
		return fileValue{}, err
	}
	h := fnv.New64a()
	var stat [16]byte
	binary.LittleEndian.PutUint64(stat[:8], uint64(info.ModTime().UnixNano()))
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		binary.LittleEndian.PutUint64(stat[8:], sys.Ino)
	}
	h.Write(stat[:])
	h.Write(value)
	return fileValue{value: value, version: max(h.Sum64(), 1), modTime: info.ModTime()}, nil
}

// find gives the file of a key that has a value.
func (d *dirStore) find(key string) (string, bool) {
	var in func(dir string, parts []string) (string, bool)
	in = func(dir string, parts []string) (string, bool) {
		path := filepath.Join(dir, parts[0])
		if len(parts) == 1 {
			info, err := os.Lstat(path)
			return path, err == nil && info.Mode().IsRegular()
		}
		for _, folder := range []string{path, path + "@"} {
			if isDir(folder) {
				if found, ok := in(folder, parts[1:]); ok {
					return found, true
				}
			}
		}
		return "", false
	}
	return in(d.dir, strings.Split(key, "/"))
}

// place gives the file that a key is to be written to, and makes room for it.
func (d *dirStore) place(key string) (string, error) {
	if path, ok := d.find(key); ok {
		return path, nil
	}
	dir, parts := d.dir, strings.Split(key, "/")
	for i := range parts[:len(parts)-1] {
		var err error
		if dir, err = d.enter(dir, parts[:i+1]); err != nil {
			return "", err
		}
	}
	path := filepath.Join(dir, parts[len(parts)-1])
	if isDir(path) {
		d.step("make room for " + key)
		if err := moveAside(path, path+"@"); err != nil {
			return "", err
		}
	}
	return path, nil
}

// enter gives the directory in dir that is to hold what lies below the key of these parts, and makes it if it is missing.
func (d *dirStore) enter(dir string, parts []string) (string, error) {
	plain := filepath.Join(dir, parts[len(parts)-1])
	marked := plain + "@"
	if isDir(marked) {
		return marked, nil
	}
	if isDir(plain) {
		return plain, nil
	}
	made := plain
	if _, err := os.Lstat(plain); err == nil || holdsValue(parts) {
		made = marked
	}
	if err := os.Mkdir(made, 0o755); err != nil {
		return "", err
	}
	return made, durable.SyncDir(dir)
}

// holdsValue tells of the keys that have both a value and keys below them: the pins of units and of their nodes.
func holdsValue(parts []string) bool {
	return len(parts) == 4 && parts[0]+"/" == PinsPrefix
}

// moveAside moves all of a directory into another, which may be there already.
func moveAside(from, to string) error {
	if !isDir(to) {
		return os.Rename(from, to)
	}
	files, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, f := range files {
		src, dst := filepath.Join(from, f.Name()), filepath.Join(to, f.Name())
		if f.IsDir() && isDir(dst) {
			err = moveAside(src, dst)
		} else {
			err = os.Rename(src, dst)
		}
		if err != nil {
			return err
		}
	}
	return os.Remove(from)
}

// ignoredFile tells of names that are no part of a key: hidden files, and what editors leave beside what they edit.
func ignoredFile(name string) bool { return deployments.CheckSegment("file", name) != nil }

// there reports whether the store's directory is. It may be a link, which one below it may not.
func (d *dirStore) there() bool {
	info, err := os.Stat(d.dir)
	return err == nil && info.IsDir()
}

func isDir(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.IsDir()
}
