package dir

import (
	"log/slog"
	"path/filepath"
	"sync"

	"github.com/fsnotify/fsnotify"

	"kedge/deployments/wait"
)

// notifier forwards changes of a store's directories to the watches that have subscribed to them. It uses one inotify
// instance, as the kernel allows a user only 128 of them.
type notifier struct {
	log     *slog.Logger
	ignored func(path string) bool

	mu            sync.Mutex
	watcher       *fsnotify.Watcher // nil: no subscription
	subscriptions map[*subscription]bool
}

// subscription is one watch's interest in the changes of some directories.
type subscription struct {
	n *notifier
	// signal is set when something changed in dirs, or events were lost.
	signal wait.Signal
	dirs   map[string]bool // guarded by notifier.mu
}

// subscribe returns a subscription without directories, which the caller must end. An error means that the kernel can't
// notify changes here.
func (n *notifier) subscribe() (*subscription, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.watcher == nil {
		w, err := fsnotify.NewWatcher()
		if err != nil {
			return nil, err
		}
		n.watcher, n.subscriptions = w, map[*subscription]bool{}
		go n.forward(w)
	}
	c := &subscription{n: n, signal: wait.NewSignal(), dirs: map[string]bool{}}
	n.subscriptions[c] = true
	return c, nil
}

// forward forwards file system events to the subscriptions until the watcher is closed.
func (n *notifier) forward(w *fsnotify.Watcher) {
	for {
		select {
		case e, ok := <-w.Events:
			if !ok {
				return
			}
			if e.Op != fsnotify.Chmod && !n.ignored(e.Name) {
				n.signal(func(c *subscription) bool { return c.dirs[filepath.Dir(e.Name)] || c.dirs[e.Name] })
			}
		case err, ok := <-w.Errors:
			if !ok {
				return
			}
			n.log.Debug("missed events of the store's directory: reading it again", "error", err)
			n.signal(func(*subscription) bool { return true })
		}
	}
}

func (n *notifier) signal(which func(*subscription) bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for c := range n.subscriptions {
		if !which(c) {
			continue
		}
		c.signal.Set()
	}
}

// watchDir subscribes to the changes in a directory. If the directory is removed and made anew, the caller must call it
// again. The error comes from the kernel, such as its limit of watches.
func (c *subscription) watchDir(dir string) error {
	c.n.mu.Lock()
	c.dirs[dir] = true
	w := c.n.watcher
	c.n.mu.Unlock()
	return w.Add(dir)
}

// end cancels the subscription. If it was the last one, end closes the watcher.
func (c *subscription) end() {
	n := c.n
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.subscriptions, c)
	if len(n.subscriptions) == 0 {
		n.watcher.Close()
		n.watcher = nil
		return
	}
	for dir := range c.dirs {
		wanted := false
		for other := range n.subscriptions {
			wanted = wanted || other.dirs[dir]
		}
		if !wanted {
			_ = n.watcher.Remove(dir) // it may be gone already
		}
	}
}
