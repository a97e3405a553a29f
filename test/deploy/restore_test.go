package deploy

import (
	"reflect"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
)

// The pod that puts a copy back writes where the server reads, as the user that the server is.
func TestTheRestoringPodIsTheServersTwin(t *testing.T) {
	var server *appsv1.StatefulSet
	for _, o := range manifests(t) {
		if s, ok := o.(*appsv1.StatefulSet); ok {
			server = s
		}
	}
	all := objects(t, base+"/../restore.yaml")
	if server == nil || len(all) != 1 {
		t.Fatalf("there are %d objects, and the StatefulSet is %v", len(all), server)
	}
	pod, ok := all[0].(*corev1.Pod)
	if !ok {
		t.Fatalf("it is a %T", all[0])
	}
	spec, of := pod.Spec, server.Spec.Template.Spec
	c, its := spec.Containers[0], of.Containers[0]
	for what, pair := range map[string][2]any{
		"pod's user":         {spec.SecurityContext, of.SecurityContext},
		"container's rights": {c.SecurityContext, its.SecurityContext},
		"image":              {c.Image, its.Image},
		"claim": {
			spec.Volumes[0].PersistentVolumeClaim.ClaimName,
			server.Spec.VolumeClaimTemplates[0].Name + "-" + server.Name + "-0",
		},
	} {
		if !reflect.DeepEqual(pair[0], pair[1]) {
			t.Errorf("%s is %v, the server's is %v", what, pair[0], pair[1])
		}
	}
	for _, m := range its.VolumeMounts {
		if m.Name == spec.Volumes[0].Name && m != c.VolumeMounts[0] {
			t.Errorf("the volume is at %v, the server's at %v", c.VolumeMounts[0], m)
		}
	}
	if args := strings.Join(c.Args, " "); !strings.Contains(args, "-dataDir "+c.VolumeMounts[0].MountPath+"/server ") {
		t.Errorf("it restores with %s", args)
	}
}
