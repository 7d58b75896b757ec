// Package inputfile reads the files that settings name: keys, tokens, certificates, configurations. It bounds time
// and memory, whatever kind of file it is given.
package inputfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"time"
)

const (
	// Max is the largest size of a file, in bytes.
	Max = 4 << 20
	// pipeWithin bounds how long the writer of a pipe may take.
	pipeWithin = 10 * time.Second
)

// Read returns the content of a regular file of at most Max bytes; nil for /dev/null. An error begins with the setting,
// such as a flag or a variable, and names the file. Of a setting whose name ends in _FILE it doesn't name a missing
// file without a slash: that may be a secret that was given instead of its file.
func Read(setting, path string) ([]byte, error) { return read(setting, path, checkRegular) }

// ReadOnce is Read for a file that is read only once: it also accepts a pipe, such as a shell's <(command).
func ReadOnce(setting, path string) ([]byte, error) {
	return read(setting, path, func(path string, info fs.FileInfo) error {
		if info.Mode()&fs.ModeNamedPipe != 0 {
			return nil
		}
		return checkRegular(path, info)
	})
}

// ReadPrivate is Read for a file that only root, or this process's user, may read and change.
func ReadPrivate(setting, path string) ([]byte, error) { return read(setting, path, checkPrivate) }

// Check returns the error that Read would return, for files that a library reads by name.
func Check(setting, path string) error {
	_, err := Read(setting, path)
	return err
}

// read reads the file at path. accept returns an error for an opened file that must not be read.
func read(setting, path string, accept func(path string, info fs.FileInfo) error) ([]byte, error) {
	if path == os.DevNull {
		return nil, nil // the usual name for no content
	}
	data, err := readBounded(path, accept)
	if errors.Is(err, fs.ErrNotExist) && !strings.Contains(path, "/") &&
		strings.HasSuffix(strings.ToUpper(setting), "_FILE") {
		err = fmt.Errorf("there is no file of that name in the working directory, and the name isn't shown, as it may be a "+
			"secret: want a file's path: %w", fs.ErrNotExist)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", setting, err)
	}
	return data, nil
}

func checkRegular(path string, info fs.FileInfo) error {
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is %s: name a regular file", path, kind(info.Mode()))
	}
	return nil
}

func checkPrivate(path string, info fs.FileInfo) error {
	if err := checkRegular(path, info); err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to user %d: chown it to root, or to the user that kedge runs as", path, st.Uid)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("others may read or change %s: chmod 600 it", path)
	}
	return nil
}

func readBounded(path string, accept func(path string, info fs.FileInfo) error) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // opening a pipe would wait for its writer
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := accept(path, info); err != nil {
		return nil, err
	}
	pipe := info.Mode()&fs.ModeNamedPipe != 0
	if pipe {
		if err := f.SetReadDeadline(time.Now().Add(pipeWithin)); err != nil {
			return nil, err
		}
	}
	data, err := io.ReadAll(io.LimitReader(f, Max+1))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Errorf("%s is a pipe whose writer did not end within %v", path, pipeWithin)
	case err != nil:
		return nil, err
	case pipe && len(data) == 0:
		return nil, fmt.Errorf("%s is a pipe that nobody writes to", path)
	case len(data) > Max:
		return nil, fmt.Errorf("%s has more than %d MiB", path, Max>>20)
	}
	return data, nil
}

func kind(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "a directory"
	case m&fs.ModeNamedPipe != 0:
		return "a pipe"
	case m&fs.ModeDevice != 0:
		return "a device"
	}
	return "a socket"
}
