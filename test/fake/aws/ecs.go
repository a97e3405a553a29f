package aws

import (
	"encoding/json"
	"net/http"
	"strings"
	"time"
)

// Task is one of ECS.
type Task struct {
	ARN, Account, Cluster, Family, Revision, Service, LaunchType, Status string
	// Containers are the names of its containers by ID.
	Containers map[string]string
}

// AddTask adds a task and lets the credentials service hand out its role's key.
func (c *Cloud) AddTask(t Task, role Key) {
	c.Lock()
	defer c.Unlock()
	c.Tasks[t.ARN] = t
	c.Keys[role.ID] = role
	c.Role = role
}

// MetadataURI is what ECS sets as ECS_CONTAINER_METADATA_URI_V4 in the containers of a task.
func (c *Cloud) MetadataURI(arn string) string {
	return c.URL() + "/v4/" + arn[strings.LastIndexByte(arn, '/')+1:]
}

// CredentialsURI is where the task's credentials are.
func (c *Cloud) CredentialsURI() string { return c.URL() + "/v2/credentials/4f3e" }

type shownContainer struct {
	DockerID   string            `json:"DockerId"`
	DockerName string            `json:"DockerName"`
	Name       string            `json:"Name"`
	Image      string            `json:"Image,omitempty"`
	ImageID    string            `json:"ImageID,omitempty"`
	Labels     map[string]string `json:"Labels,omitempty"`
}

// beside answers for what is on the host or its link.
func (c *Cloud) beside(w http.ResponseWriter, r *http.Request) {
	c.Asked[strings.Split(r.URL.Path, "/")[1]]++
	switch path := r.URL.Path; {
	case r.Method != http.MethodGet:
		w.WriteHeader(http.StatusMethodNotAllowed)
	case path == "/v1/tasks":
		c.introspect(w, r.URL.Query().Get("dockerid"))
	case path == "/v1/metadata":
		answer(w, http.StatusOK, map[string]any{"Cluster": "default", "ContainerInstanceArn": nil, "Version": "Amazon ECS Agent - v1.89.0 (*)"})
	case path == "/v2/credentials/4f3e" && c.Role.ID != "":
		answer(w, http.StatusOK, map[string]any{
			"RoleArn": c.Role.ARN, "AccessKeyId": c.Role.ID, "SecretAccessKey": c.Role.Secret, "Token": c.Role.Token, "Expiration": time.Now().Add(time.Hour),
		})
	case path == "/v1/credentials" && c.PodToken != "" && r.Header.Get("Authorization") == c.PodToken:
		answer(w, http.StatusOK, map[string]any{
			"AccountId": c.Role.Account, "AccessKeyId": c.Role.ID, "SecretAccessKey": c.Role.Secret, "Token": c.Role.Token, "Expiration": time.Now().Add(time.Hour),
		})
	case path == "/v1/credentials":
		w.WriteHeader(http.StatusUnauthorized)
	case strings.HasPrefix(path, "/v4/") && strings.HasSuffix(path, "/task"):
		for _, t := range c.Tasks {
			if strings.HasSuffix(t.ARN, "/"+strings.Split(path, "/")[2]) {
				answer(w, http.StatusOK, map[string]any{
					"Cluster": t.Cluster, "TaskARN": t.ARN, "Family": t.Family, "Revision": t.Revision, "ServiceName": t.Service,
					"LaunchType": t.LaunchType, "DesiredStatus": t.Status, "KnownStatus": t.Status, "Containers": containers(t),
				})
				return
			}
		}
		w.WriteHeader(http.StatusNotFound)
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

// introspect is the ECS agent's answer about one container. An unknown one is an empty task and 404.
func (c *Cloud) introspect(w http.ResponseWriter, id string) {
	for _, t := range c.Tasks {
		if _, ok := t.Containers[id]; ok {
			shown := containers(t)
			for i := range shown {
				shown[i].Image, shown[i].ImageID, shown[i].Labels = "", "", nil
			}
			answer(w, http.StatusOK, map[string]any{
				"Arn": t.ARN, "DesiredStatus": t.Status, "KnownStatus": t.Status, "Family": t.Family, "Version": t.Revision, "Containers": shown,
			})
			return
		}
	}
	answer(w, http.StatusNotFound, map[string]any{"Arn": "", "KnownStatus": "", "Family": "", "Version": "", "Containers": nil})
}

func containers(t Task) []shownContainer {
	var all []shownContainer
	for id, name := range t.Containers {
		all = append(all, shownContainer{
			DockerID: id, DockerName: "ecs-" + t.Family + "-" + t.Revision + "-" + name, Name: name, Image: "registry.example/" + name + ":1",
			ImageID: "sha256:" + sum(name), Labels: map[string]string{"com.amazonaws.ecs.container-name": name, "com.amazonaws.ecs.task-arn": t.ARN},
		})
	}
	return all
}

// ecs answers for the service itself.
func (c *Cloud) ecs(w http.ResponseWriter, operation string, body []byte, key Key) {
	var question struct {
		Cluster string   `json:"cluster"`
		Tasks   []string `json:"tasks"`
	}
	if operation != "AmazonEC2ContainerServiceV20141113.DescribeTasks" || json.Unmarshal(body, &question) != nil || len(question.Tasks) == 0 || len(question.Tasks) > 100 {
		answer(w, http.StatusBadRequest, map[string]string{"__type": "InvalidParameterException"})
		return
	}
	c.Asked["DescribeTasks"]++
	var tasks, failures []map[string]string
	for _, arn := range question.Tasks {
		t, ok := c.Tasks[arn]
		if !ok || t.Account != key.Account || t.Cluster != question.Cluster {
			failures = append(failures, map[string]string{"arn": arn, "reason": "MISSING"})
			continue
		}
		group := "family:" + t.Family
		if t.Service != "" {
			group = "service:" + t.Service
		}
		tasks = append(tasks, map[string]string{
			"taskArn": arn, "taskDefinitionArn": "arn:aws:ecs:us-east-1:" + t.Account + ":task-definition/" + t.Family + ":" + t.Revision,
			"clusterArn": "arn:aws:ecs:us-east-1:" + t.Account + ":cluster/" + t.Cluster, "group": group, "launchType": t.LaunchType, "lastStatus": t.Status,
		})
	}
	answer(w, http.StatusOK, map[string]any{"tasks": tasks, "failures": failures})
}

func answer(w http.ResponseWriter, status int, what any) {
	text, err := json.Marshal(what)
	if err != nil {
		status = http.StatusInternalServerError
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(text)
}
